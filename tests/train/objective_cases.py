"""One small model for every objective; run with meshes as arguments: its losses on eight devices. Prints JSON."""

import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from model import ModelConfig
from model.sharding import batch_shardings, make_mesh, parse_mesh, replicated, shardings
from train import HParams, TrainConfig, init_state, train_step
from train.data.noise import Noise
from train.objectives import (
    Classification,
    Instruction,
    LanguageModeling,
    MaskedLanguageModeling,
    Objective,
    Preference,
    Rated,
    Reward,
    SpanCorruption,
)
from train.objectives.answers import AnswerObjective

VOCAB = 320  # of the text
DECODER = ModelConfig(vocab_size=VOCAB + 8, d_model=16, num_layers=1, num_heads=4, d_ff=32, max_seq_len=32)
ENCODER = DECODER.replace(
    stack="encoder", norm="layernorm", gated=False, use_bias=True, position="learned", norm_placement="post"
)
TRAIN = TrainConfig(batch_size=8, seq_len=32, norms=False, schedule="constant")
HPARAMS = HParams(
    learning_rate=1e-2, weight_decay=0.0, mask_rate=0.3, label_smoothing=0.1, ld_alpha=0.5, center_weight=0.01
)


REFERENCE = "fixed"  # the name of the log-probabilities that the fixture `examples` keeps with the data


class Case(NamedTuple):
    """An objective with a model that it trains; frozen: prefixes of what is trained alone where something is frozen."""

    config: ModelConfig
    objective: Objective
    train: TrainConfig = TRAIN
    trainable: tuple[str, ...] = ("final_norm",)


CASES = {
    "language-modeling": Case(DECODER, LanguageModeling()),
    "masked": Case(
        ENCODER.replace(head="masked-language-model", head_bias=True),
        MaskedLanguageModeling(mask_id=VOCAB),
        trainable=("head", "layers/dense/feed_forward"),
    ),
    "masked-packed": Case(
        ENCODER.replace(head="masked-language-model", head_bias=True),
        MaskedLanguageModeling(mask_id=VOCAB),
        TRAIN.replace(packing="best-fit"),
        trainable=("head",),
    ),
    "spans": Case(
        DECODER.replace(stack="encoder-decoder", position="relative"),
        SpanCorruption(sentinels=8).resolved(DECODER),
        trainable=("encoder", "final_norm"),
    ),
    "classification": Case(
        ENCODER.replace(head="classifier", head_bias=True, pooler=True, num_labels=3),
        Classification(),
        trainable=("head", "pooler"),
    ),
    "instruction": Case(DECODER, Instruction()),
    "preference": Case(DECODER, Preference(kind="cdpo", reference=REFERENCE)),
    "preference-orpo": Case(DECODER, Preference(kind="orpo", weighting="wpo")),
    "rated": Case(DECODER, Rated(reference=REFERENCE)),
    "reward": Case(DECODER.replace(head="scalar"), Reward(margins=True), trainable=("head",)),
}


class _Text:
    """The fields of a manifest that `corrupt` reads."""

    eos_id, vocab_size = 2, VOCAB


def batch_of(case: Case, number: int = 0) -> dict[str, Any]:
    """Return a batch of random text whose first row has a single token that counts, and no two rows as many."""
    random = np.random.default_rng(number)
    rows, seq_len = case.train.batch_size, case.train.seq_len
    text = random.integers(3, VOCAB, (rows, seq_len + 1)).astype(np.int32)
    filled = (np.arange(seq_len) < np.linspace(4, seq_len, rows).round()[:, None]).astype(np.int32)
    if isinstance(case.objective, Classification):
        labels = random.integers(0, 3, rows).astype(np.int32)
        return {"tokens": text[:, :-1] * filled, "segment_ids": filled, "labels": labels}
    drawn = {"tokens": text[:, :-1], "targets": text[:, 1:]}
    if isinstance(case.objective, AnswerObjective):
        return _answers(case, random, filled)
    if isinstance(case.objective, (LanguageModeling, Instruction)):
        return drawn | {"loss_mask": filled.astype(np.float32)}
    drawn |= {"segment_ids": filled, "positions": np.arange(seq_len, dtype=np.int32) * filled}
    noise = Noise.of_rows(0, np.arange(rows) + rows * number, seq_len)
    return case.objective.corrupt(case.config, drawn, noise, _Text(), HPARAMS)


def _answers(case: Case, random: np.random.Generator, filled: np.ndarray) -> dict[str, Any]:
    """Return examples of answers of several lengths after prompts of two tokens, with a weight of their own each."""
    rows = len(filled)
    batch: dict[str, Any] = {"weights": np.linspace(0.5, 1.5, rows).astype(np.float32)}
    for side, real in zip(case.objective.SIDES, (filled, filled[::-1]), strict=True):
        tokens = random.integers(3, VOCAB, real.shape).astype(np.int32)
        mask = (real * (np.arange(real.shape[1]) >= 2)).astype(np.float32)
        batch |= {f"{side}tokens": tokens * real, f"{side}mask": mask, f"{side}segment_ids": real}
    batch["labels"] = random.integers(0, 2, rows).astype(np.int32)
    of_pairs = ("reference_chosen", "reference_rejected", "reference_chosen_tail", "reference_rejected_tail")
    for name in ("reference", "mismatched_reference", *of_pairs):
        batch[name] = random.normal(-40, 5, rows).astype(np.float32)
    batch["margins"] = random.uniform(0, 1, rows).astype(np.float32)
    spec = case.objective.batch_spec(case.config, case.train, rows, filled.shape[1])
    return {name: batch[name] for name in spec}


def losses_on(case: Case, mesh, state, steps: int) -> list[float]:
    """Return the losses of the first steps from a state on a mesh."""
    of_state = shardings(mesh, state)
    batches = [batch_of(case, number) for number in range(steps)]
    step = jax.jit(
        functools.partial(train_step, case.config, case.train, objective=case.objective),
        in_shardings=(of_state, batch_shardings(mesh, batches[0]), replicated(mesh)),
        out_shardings=(of_state, replicated(mesh)),
    )
    losses = []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, of_state)
        for batch in batches:
            state, metrics = step(state, batch, HPARAMS)
            losses.append(float(metrics["loss"]))
    return losses


def main(steps, *meshes):
    """Print {case: {mesh: losses}}; the mesh "data=1" is one device."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, case in CASES.items():
        if name == "masked-packed":  # the program of "masked"
            continue
        init = functools.partial(init_state, case.config, case.train, objective=case.objective)
        state = jax.device_get(jax.jit(init)(HPARAMS))
        found[name] = {mesh: losses_on(case, make_mesh(parse_mesh(mesh)), state, int(steps)) for mesh in meshes}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Evaluation of a model by its training objective, beside what a model reaches that does not look at its input."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig, Params
from train import HParams, TrainConfig, eval_step
from train.data.folders import Data
from train.objectives import Objective
from train.objectives.tokens import TokenObjective
from train.plan import Plan
from train.progress import progress_bar

_COUNTED = 2**20  # tokens of training text that a unigram model is counted on


def evaluate_objective(
    config: ModelConfig,
    params: Params,
    objective: Objective,
    data: str | Path,
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """{"objective", the means that it evaluates, what they are means over, "seq_len"} on the validation split.

    Of objectives that predict tokens also "unigram_loss", on the same positions: that of the frequencies of the
    training split's targets, which is the least that a model can reach without looking at its input.
    Raises InputError where model, objective and data do not go together.
    """
    seq_len = seq_len or config.max_seq_len
    train_config = TrainConfig(batch_size=batch_size, seq_len=seq_len)
    opened = Data.open(data)
    objective = objective.resolved(config)
    objective.check(config, train_config)
    objective.check_data(config, opened.sources)
    batches = objective.validation(config, train_config, opened.first, max_tokens)
    step = jax.jit(functools.partial(eval_step, config, objective=objective))
    rows = []
    with progress_bar("evaluating", len(batches)) as advance:
        for batch in batches:
            rows.append({name: float(value) for name, value in jax.device_get(step(params, batch)).items()})
            advance()
    weights = np.array([row[objective.WEIGHT] for row in rows])
    mean = lambda name: float(np.dot([row[name] for row in rows], weights) / weights.sum())
    values = {"objective": objective.NAME} | {name: mean(name) for name in objective.EVALUATED}
    values |= {objective.WEIGHT: int(weights.sum()), "seq_len": seq_len}
    if isinstance(objective, TokenObjective):
        values["unigram_loss"] = _unigram_loss(config, objective, train_config, opened, batches)
    return values


def _unigram_loss(
    config: ModelConfig, objective: TokenObjective, train_config: TrainConfig, data: Data, batches: list[Any]
) -> float:
    """Nats per predicted token of the frequencies in training batches, with one more count for every id."""
    steps = -(-_COUNTED // train_config.tokens_per_step)
    loader = objective.source(config, train_config, HParams(), data.sources, Plan.of(train_config, steps))
    counts = np.ones(config.vocab_size)
    for number in range(steps):
        if loader.epoch(number) >= 1:
            break
        counts += _counts(loader.batch(number), config.vocab_size)
    predicted = np.sum([_counts(batch, config.vocab_size) for batch in batches], axis=0)
    return float(-(predicted * np.log(counts / counts.sum())).sum() / predicted.sum())


def _counts(batch: Any, vocab_size: int) -> np.ndarray:
    targets, mask = batch["targets"], batch.get("loss_mask")
    weights = None if mask is None else mask.ravel()
    return np.bincount(targets.ravel(), weights, minlength=vocab_size)

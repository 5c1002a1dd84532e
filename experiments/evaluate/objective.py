"""Evaluate a model by its training objective, and compare it with models that ignore their input."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from model import ModelConfig, Params
from train import HParams, TrainConfig, eval_step
from train.data.folders import Data
from train.data.manifest import load_manifest
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
    """Return {"objective", the means that it evaluates, what they are means over, "seq_len"} on the validation split.

    For objectives that predict tokens also, on the same positions: "unigram_loss", that of the frequencies of the
    training split's targets, and "context_free_loss", the least that a model can reach without looking at other
    positions (`TokenObjective.context_free_nats`).
    Raises InputError if model, objective and data do not go together.
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

    def mean(name: str) -> float:
        return float(np.dot([row[name] for row in rows], weights) / weights.sum())

    values = {"objective": objective.NAME} | {name: mean(name) for name in objective.EVALUATED}
    values |= {objective.WEIGHT: int(weights.sum()), "seq_len": seq_len}
    if isinstance(objective, TokenObjective):
        frequencies = _frequencies(config, objective, train_config, opened)
        manifest = load_manifest(opened.first)

        def plain(batch: dict[str, np.ndarray]) -> np.ndarray:
            return -np.log(frequencies[batch["targets"]])

        def alone(batch: dict[str, np.ndarray]) -> np.ndarray:
            return objective.context_free_nats(config, batch, manifest, frequencies)

        values |= {"unigram_loss": _mean(plain, batches), "context_free_loss": _mean(alone, batches)}
    return values


def _frequencies(
    config: ModelConfig, objective: TokenObjective, train_config: TrainConfig, data: Data
) -> Float64[np.ndarray, " vocab"]:
    """Return the frequencies of the targets in training batches, with one more count for every id."""
    steps = -(-_COUNTED // train_config.tokens_per_step)
    loader = objective.source(config, train_config, HParams(), data.sources, Plan.of(train_config, steps))
    counts = np.ones(config.vocab_size)
    for number in range(steps):
        if loader.epoch(number) >= 1:
            break
        batch = loader.batch(number)
        counts += np.bincount(batch["targets"].ravel(), _weights(batch).ravel(), minlength=config.vocab_size)
    return counts / counts.sum()


def _mean(nats: Callable[[Any], np.ndarray], batches: list[Any]) -> float:
    """Return the mean over the predicted tokens of all batches."""
    total = sum((nats(batch) * _weights(batch)).sum() for batch in batches)
    return float(total / sum(_weights(batch).sum() for batch in batches))


def _weights(batch: Any) -> np.ndarray:
    """Return 1 where a token is predicted, float64."""
    return np.asarray(batch.get("loss_mask", np.ones(batch["targets"].shape)), np.float64)

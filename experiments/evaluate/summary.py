"""Summarise the answers to a task: each metric's mean with its standard error and 95 % interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from experiments.evaluate.statistics.mean import Mean, estimate_mean, linearised
from train.clusters import cluster_ids

Summary = dict[str, float | None]
"""{"value", "standard_error", "low", "high"}; None where one question or one cluster tells nothing about others."""


def summarise(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Summary]:
    """Return each metric's summary over the rows of an answers file (`statistics.mean.estimate_mean`).

    Standard errors are clustered where rows name clusters. For texts, bits per byte and perplexity are ratios of sums,
    and the texts are independent.
    """
    if kind == "text":
        return _of_texts(rows)
    clusters = cluster_ids([row["cluster"] for row in rows])
    names = common_metrics(rows)
    values = {name: np.array([row["metrics"][name] for row in rows], np.float64) for name in names}
    return {name: _summary(estimate_mean(array, clusters)) for name, array in values.items()}


def common_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics that every answer has."""
    return [name for name in rows[0]["metrics"] if all(row["metrics"].get(name) is not None for row in rows)]


def bits_per_byte_of(rows: Sequence[Mapping[str, Any]]) -> Float64[np.ndarray, " texts"]:
    """Return values whose mean is the texts' bits over their bytes, not the mean of the texts' own (`linearised`)."""
    nats, size = (np.array([row[name] for row in rows], np.float64) for name in ("nats", "bytes"))
    return linearised(nats / math.log(2) / size, size)


def _summary(mean: Mean) -> Summary:
    return {name: getattr(mean, name) for name in ("value", "standard_error", "low", "high")}


def _of_texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Summary]:
    nats, tokens = (np.array([row[name] for row in rows], np.float64) for name in ("nats", "tokens"))
    bits = _summary(estimate_mean(bits_per_byte_of(rows)))
    loss = _summary(estimate_mean(linearised(nats / tokens, tokens)))
    perplexity = {name: None if value is None else math.exp(value) for name, value in loss.items()}
    if loss["standard_error"] is not None and perplexity["value"] is not None:
        perplexity["standard_error"] = perplexity["value"] * loss["standard_error"]  # of first order
    return {"bits_per_byte": bits, "perplexity": perplexity}

"""Compare a decode step with the machine's roofline (Williams, Waterman and Patterson 2009)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.bench.ceilings import Ceilings
from experiments.bench.decode.cells import Cell
from model import ModelConfig, Params, accounting

BOOTSTRAPS = 2000
LEVEL = 95
NOTE = (
    "weights read once a step, of the token table only the rows looked up unless it is the head; of routed experts the "
    "expected number of distinct ones; the cache as filled at the middle of the measured stretch; activations and what "
    "is written are left out"
)


def step_cost(config: ModelConfig, params: Params, cell: Cell, steps: int) -> dict[str, float]:
    """Return bytes and FLOPs of the middle one of the decode steps; params: prepared arrays, or their shapes."""
    length = cell.depth + (steps + 1) // 2
    read = accounting.decode_step_bytes(config, params, cell.batch, length, cell.cache)
    return {
        "weight_bytes_read_per_step": read["weights"] + read["embedding"],
        "kv_cache_bytes_filled": read["cache"],
        "bytes_read_per_step_filled": sum(read.values()),
        "flops_exact_per_step": accounting.decode_step_flops(config, cell.batch, length),
    }


def shares(cost: dict[str, float], seconds_per_step: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return the step's time as a share of both ceilings.

    bound: the one that alone would take longer; its share is the step's efficiency. Over 1 if the weights fit a cache,
    which is faster than the memory that the probe reads.
    """
    read = cost["bytes_read_per_step_filled"] / ceilings.read_bytes_per_second / seconds_per_step
    compute = cost["flops_exact_per_step"] / ceilings.matmul_flops_per_second / seconds_per_step
    return {
        "read_bytes_per_second": cost["bytes_read_per_step_filled"] / seconds_per_step,
        "flops_exact_per_second": cost["flops_exact_per_step"] / seconds_per_step,
        "flops_per_byte": cost["flops_exact_per_step"] / cost["bytes_read_per_step_filled"],
        "share_of_read_bandwidth": read,
        "share_of_matmul_peak": compute,
        "bound": "memory" if read >= compute else "compute",
        "share_of_bound": max(read, compute),
    }


def add_shares(rows: list[dict[str, Any]], ceilings: Ceilings) -> None:
    """Add `shares` to every row that was measured, and the interval of its share of the bound."""
    for row in rows:
        if "error" not in row:
            row |= shares(row, row["seconds_per_step"], ceilings)
            memory = row["bound"] == "memory"
            name = "read_bytes_per_second" if memory else "matmul_flops_per_second"
            work = row["bytes_read_per_step_filled" if memory else "flops_exact_per_step"]
            row[f"share_of_bound_interval_{LEVEL}"] = share_interval(
                work,
                row["samples"]["seconds_per_step"],
                getattr(ceilings, f"{name}_measured") or (getattr(ceilings, name),),
            )


def share_interval(work: float, seconds: Sequence[float], ceilings: Sequence[float], seed: int = 0) -> list[float]:
    """Return the 95 % interval of a share of a ceiling: work over the median of resampled seconds, over the ceiling.

    The ceiling is drawn from its measurements: the step ran while the machine was as fast as in any one of them.
    """
    random = np.random.default_rng(seed)
    medians = np.median(random.choice(seconds, (BOOTSTRAPS, len(seconds))), axis=1)
    drawn = work / medians / random.choice(ceilings, BOOTSTRAPS)
    tail = (100 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(drawn, [tail, 100 - tail])]

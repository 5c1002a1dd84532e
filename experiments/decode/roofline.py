"""How near a decode step comes to what the machine can do (the roofline of Williams, Waterman and Patterson 2009)."""

from typing import Any

from experiments.decode.cells import Cell
from experiments.decode.probes import Ceilings
from model import ModelConfig, Params, accounting

NOTE = (
    "weights read once a step, of the token table only the rows looked up unless it is the head; of routed experts the "
    "expected number of distinct ones; the cache as filled at the middle of the measured stretch; activations and what "
    "is written are left out"
)


def step_cost(config: ModelConfig, params: Params, cell: Cell, steps: int) -> dict[str, float]:
    """Bytes and FLOPs of the step in the middle of the stretch; params: prepared arrays, or their shapes."""
    length = cell.depth + (steps + 1) // 2
    read = accounting.decode_step_bytes(config, params, cell.batch, length, cell.cache)
    return {
        "weight_bytes_read_per_step": read["weights"] + read["embedding"],
        "kv_cache_bytes_filled": read["cache"],
        "bytes_read_per_step_filled": sum(read.values()),
        "flops_exact_per_step": accounting.decode_step_flops(config, cell.batch, length),
    }


def shares(cost: dict[str, float], seconds_per_step: float, ceilings: Ceilings) -> dict[str, Any]:
    """The step against both ceilings. bound: the one that alone would take longer; its share is the step's efficiency.

    Over 1 where the weights fit a cache, which is faster than the memory that the probe reads.
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
    """`shares` into every row that was measured."""
    for row in rows:
        if "error" not in row:
            row |= shares(row, row["seconds_per_step"], ceilings)

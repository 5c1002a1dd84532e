"""Measure this machine's ceilings in the same run: memory bandwidth and FLOP/s of a matrix product."""

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.peak import measured_peak

COLUMNS = 4096


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """read_form: the fastest way of reading; read_bytes: of the buffer, beyond every cache.

    measured: every measurement of that ceiling, of which the highest is the ceiling; their spread shows how much the
    machine's speed varied.
    """

    read_bytes_per_second: float
    read_form: str
    read_bytes: int
    read_bytes_per_second_by_form: dict[str, float]
    matmul_flops_per_second: float
    matmul_dtype: str
    read_bytes_per_second_measured: tuple[float, ...] = ()
    matmul_flops_per_second_measured: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def measure_ceilings(dtype: str, *, size: int | None = None, seconds: float = 0.4, rounds: int = 3) -> Ceilings:
    """Measure both ceilings `rounds` times, interleaved.

    size: bytes of the buffer that is read; None: `buffer_bytes()`. seconds: per form of reading, over all rounds.
    """
    size = size or buffer_bytes()
    reads, reading, products = _read_functions(size), [], []
    for _ in range(rounds):
        reading.append({name: size / _best(read, seconds / rounds) for name, read in reads.items()})
        measured_peak.cache_clear()  # measured anew, not reused from earlier in this process
        products.append(measured_peak(dtype))
    rates = {name: max(one[name] for one in reading) for name in reads}
    form = max(rates, key=rates.__getitem__)
    fastest = tuple(max(one.values()) for one in reading)
    return Ceilings(rates[form], form, size, rates, max(products), dtype, fastest, tuple(products))


def best_of(before: Ceilings, after: Ceilings) -> Ceilings:
    """Return the higher ceilings, with all measurements: other load can only lower a ceiling."""
    higher = max(before, after, key=lambda ceilings: ceilings.read_bytes_per_second)
    return dataclasses.replace(
        higher,
        matmul_flops_per_second=max(before.matmul_flops_per_second, after.matmul_flops_per_second),
        read_bytes_per_second_measured=before.read_bytes_per_second_measured + after.read_bytes_per_second_measured,
        matmul_flops_per_second_measured=before.matmul_flops_per_second_measured
        + after.matmul_flops_per_second_measured,
    )


def buffer_bytes() -> int:
    """Return eight times the last-level cache, at least 256 MiB, at most 2 GiB; 1 GiB on an accelerator."""
    if jax.default_backend() != "cpu":
        return 1 << 30
    units = {"K": 1 << 10, "M": 1 << 20}
    caches = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        caches.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else 0)
    return min(max(8 * max(caches), 1 << 28), 1 << 31)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_functions(size: int) -> dict[str, Callable[[], Any]]:
    """Return functions that each read `size` bytes once, by name: the fastest bounds the speed of decode."""
    table, vector = jnp.ones((size // (4 * COLUMNS), COLUMNS), jnp.float32), jnp.ones(COLUMNS, jnp.float32)
    product, total, largest = jax.jit(jnp.matmul), jax.jit(jnp.sum), jax.jit(lambda x: jnp.max(x, axis=1))
    reads: dict[str, Callable[[], Any]] = {
        "XLA matrix times vector": lambda: product(table, vector).block_until_ready(),
        "XLA sum": lambda: total(table).block_until_ready(),
        "XLA largest of every row": lambda: largest(table).block_until_ready(),
    }
    if jax.default_backend() == "cpu":
        pool = ThreadPoolExecutor(cores())  # NumPy's reductions release the GIL
        parts = np.array_split(np.asarray(table).reshape(-1), cores())
        reads["NumPy sum, a thread per core"] = lambda: list(pool.map(np.sum, parts))
    return reads


def _best(read: Callable[[], Any], seconds: float) -> float:
    read()
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or count < 3:
        start = time.perf_counter()
        read()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best

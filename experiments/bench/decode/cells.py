"""Measure one cell of the benchmark: prefill, decode steps one by one, and the calls that stay on the device."""

import dataclasses
import itertools
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from infer import KVCache, Sampling, decode_step, init_cache, prefill
from infer.decode import ROOM, DecodeState, decode, init_decode_state
from infer.prompts import capacity_for
from model import ModelConfig, Params
from model.errors import InputError, check_at_least_one


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the grid. prompt: tokens prefilled. context: tokens in the cache when decoding begins.

    weights, cache: how they are stored ("float32", "bfloat16", "int8" …; cache None: the compute dtype). kv_heads:
    None is the model's own number.
    """

    batch: int = 1
    prompt: int = 32
    context: int | None = None
    weights: str = "float32"
    cache: str | None = None
    kv_heads: int | None = None

    @property
    def depth(self) -> int:
        """The context; by default the prompt."""
        return self.prompt if self.context is None else self.context


def check_cell(config: ModelConfig, cell: Cell, steps: int) -> None:
    """Raise InputError, in one sentence, for a cell that no model of this shape can run."""
    check_at_least_one(batch=cell.batch, prompt=cell.prompt, context=cell.depth, steps=steps)
    for name, value in (("prompt", cell.prompt), ("context", cell.depth)):
        if value + steps > config.max_seq_len:
            raise InputError(
                f"{name} {value} and {steps} steps exceed the model's context, max_seq_len={config.max_seq_len}"
            )


@jax.jit
def choose(logits: Array) -> Array:
    """Return the most likely token of every row, int32 [batch]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def measure(config: ModelConfig, params: Params, cell: Cell, steps: int, repeats: int) -> dict[str, Any]:
    """Return medians, tails and raw samples of one cell; params are prepared, and kv_heads and weights already in them.

    A repeat prefills the prompt into a fresh cache and chooses (time_to_first_token); brings the cache to the context
    by more such chunks, untimed; decodes `steps` tokens with the host waiting for each (time_per_output_token; of it
    host_seconds until the calls return, device_seconds from there until the token is there); goes back to the context
    and decodes as many by `infer.decode.decode`, as `generate` does, without synchronising with the host between the
    calls (seconds_per_step, which all rates are made of). The first repeat is a warm-up and not counted.
    """
    check_cell(config, cell, steps)
    run = _Run(config, params, cell, steps)
    compile_seconds = run.compile()
    start = time.perf_counter()
    run.once()
    first_run_seconds = time.perf_counter() - start
    before = COMPILES["programs"]
    samples: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, values in run.once().items():
            samples.setdefault(name, []).extend(values)
    median = {name: float(np.median(values)) for name, values in samples.items()}

    def tail(name: str, percent: float) -> float:
        return float(np.percentile(samples[name], percent))

    first, each, loop = "time_to_first_token_seconds", "time_per_output_token_seconds", "seconds_per_step"
    return {
        "steps": steps,
        "repeats": repeats,
        first: median[first],
        f"{first}_p90": tail(first, 90),
        "prefill_tokens_per_second": cell.batch * cell.prompt / median[first],
        each: median[each],
        f"{each}_p90": tail(each, 90),
        f"{each}_p99": tail(each, 99),
        "host_seconds_per_step": median["host_seconds_per_step"],
        "device_seconds_per_step": median["device_seconds_per_step"],
        loop: median[loop],
        f"{loop}_p90": tail(loop, 90),
        "decode_tokens_per_second_aggregate": cell.batch / median[loop],
        "decode_tokens_per_second_per_sequence": 1 / median[loop],
        "decode_tokens_per_second_slowest": cell.batch / max(samples[loop]),
        "decode_tokens_per_second_fastest": cell.batch / min(samples[loop]),
        **compile_seconds,
        "first_run_seconds": first_run_seconds,
        "recompiles": COMPILES["programs"] - before,
        **peak_memory(),
        "samples": samples,
    }


class _Run:
    """The shapes of one cell, and one repeat of it."""

    def __init__(self, config: ModelConfig, params: Params, cell: Cell, steps: int):
        self.config, self.params, self.cell, self.steps = config, params, cell, steps
        shape = (cell.batch, cell.prompt)
        self.tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32))
        self.token = self.tokens[:, 0]

    def compile(self) -> dict[str, Any]:
        """Return seconds to trace and compile each program, and how many came from the cache on disk."""
        loaded, cache = COMPILES["from cache"], self._cache()
        lengths = jnp.full(self.cell.batch, self.cell.prompt, jnp.int32)
        programs = {
            "prefill": lambda: prefill.lower(self.config, self.params, self.tokens, lengths, cache, fresh=True),
            "decode_step": lambda: decode_step.lower(self.config, self.params, self.token, cache),
            "decode": lambda: decode.lower(self.config, self.params, self._rows(self.token, cache), *self._call(1)),
        }
        seconds = {}
        for name, lower in programs.items():
            start = time.perf_counter()
            lower().compile()
            seconds[f"compile_seconds_{name}"] = time.perf_counter() - start
        return seconds | {"compiles_from_cache": COMPILES["from cache"] - loaded}

    def once(self) -> dict[str, list[float]]:
        """Return the samples of one repeat."""
        token, cache, first = self._prefill()
        token, cache, total, host = self._steps(token, cache)
        return {
            "time_to_first_token_seconds": [first],
            "time_per_output_token_seconds": total,
            "host_seconds_per_step": host,
            "device_seconds_per_step": [whole - part for whole, part in zip(total, host, strict=True)],
            "seconds_per_step": [self._loop(token, cache) / self.steps],
        }

    def _cache(self) -> KVCache:
        cell = self.cell
        capacity = capacity_for(self.config, max(cell.prompt, cell.depth) + self.steps)
        return jax.block_until_ready(init_cache(self.config, cell.batch, capacity, dtype=cell.cache))

    def _prefill(self) -> tuple[Array, KVCache, float]:
        cell, cache = self.cell, self._cache()

        def fill(count: int) -> Array:
            return jax.block_until_ready(jnp.full(cell.batch, count, jnp.int32))

        lengths = fill(cell.prompt)
        start = time.perf_counter()
        logits, cache = prefill(self.config, self.params, self.tokens, lengths, cache, fresh=True)
        token = jax.block_until_ready(choose(logits))
        seconds = time.perf_counter() - start
        for done in range(cell.prompt, cell.depth, cell.prompt):
            lengths = fill(min(cell.prompt, cell.depth - done))
            logits, cache = prefill(self.config, self.params, self.tokens, lengths, cache)
        return token, self._at_depth(cache), seconds

    def _steps(self, token: Array, cache: KVCache) -> tuple[Array, KVCache, list[float], list[float]]:
        total, host = [], []
        for _ in range(self.steps):
            start = time.perf_counter()
            logits, cache = decode_step(self.config, self.params, token, cache)
            token = choose(logits)
            returned = time.perf_counter()
            token.block_until_ready()
            total.append(time.perf_counter() - start)
            host.append(returned - start)
        return token, self._at_depth(cache), total, host

    def _loop(self, token: Array, cache: KVCache) -> float:
        rows, emitted = self._rows(token, cache), None
        calls = [self._call(min(ROOM, self.steps - done)) for done in range(0, self.steps, ROOM)]
        jax.block_until_ready((rows, calls))
        start = time.perf_counter()
        for call in calls:
            rows, emitted = decode(self.config, self.params, rows, *call)
        jax.block_until_ready(emitted)
        return time.perf_counter() - start

    def _rows(self, token: Array, cache: KVCache) -> DecodeState:
        """Return the decode state of greedy rows at the context, as in `generate`; prompts do not matter."""
        greedy = Sampling(temperature=0.0, stop_ids=())
        prompts = [[0] * self.cell.depth] * self.cell.batch
        rows = init_decode_state(self.config, prompts, [greedy] * self.cell.batch, cache, self.steps + 1)
        return rows.replace(token=token)

    def _call(self, steps: int) -> tuple[Array, Array]:
        return jnp.int32(steps), jnp.zeros(self.cell.batch, bool)

    def _at_depth(self, cache: KVCache) -> KVCache:
        """Return the cache at the context again: entries beyond a row's length are neither attended to nor read."""
        lengths = jnp.full(self.cell.batch, self.cell.depth, jnp.int32)
        return jax.block_until_ready(cache.replace(lengths=lengths))  # type: ignore[attr-defined]


COMPILES: Counter[str] = Counter()
"""Programs that this process compiled or loaded since this module was imported, and how many were loaded."""


def _count(event: str, *_: Any, **__: Any) -> None:
    names = {
        "/jax/core/compile/backend_compile_duration": "programs",
        "/jax/compilation_cache/cache_hits": "from cache",
    }
    if event in names:
        COMPILES[names[event]] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
jax.monitoring.register_event_listener(_count)


def peak_memory() -> dict[str, Any]:
    """Return the peak memory in bytes so far: the device's if it reports one, else this process's."""
    stats: dict[str, int] = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"peak_memory_bytes": stats["peak_bytes_in_use"], "peak_memory_source": "device, since the start"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "peak_memory_source": "resident set of the process, since the start"}


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Return every combination of the axes' values; cells with the same model (kv_heads, weights) are adjacent."""
    order = ("kv_heads", "weights", "cache", "batch", "prompt", "context")
    names = [name for name in order if axes.get(name)]
    return [
        Cell(**dict(zip(names, values, strict=True))) for values in itertools.product(*(axes[name] for name in names))
    ]

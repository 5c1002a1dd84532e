"""Measure the cells of the decode benchmark's grid; a cell that fails does not stop the others."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.bench.decode.cells import Cell, check_cell, grid, measure
from experiments.bench.decode.roofline import step_cost
from experiments.models import check_is_decoder
from infer import prepare
from model import ModelConfig, Params
from model.cache import CACHE_DTYPES
from model.dtypes import dtype_name
from model.errors import InputError, UnknownNameError, check_at_least_one
from model.quantize import KINDS
from train.progress import progress_bar

Build = Callable[[int | None], tuple[ModelConfig, Params]]
"""Returns the model with this number of KV heads; None: the model's own."""


def bench_decode(
    config: ModelConfig,
    params: Params,
    *,
    batches: Sequence[int] = (1, 8),
    contexts: Sequence[int] = (32, 96),
    steps: int = 16,
    repeats: int = 7,
    weights: str = "float32",
) -> list[dict[str, Any]]:
    """Return one row per (batch, context), where the context is the prompt: `run_grid` of these cells.

    Raises InputError.
    """
    cells = grid(batch=batches, prompt=contexts, weights=(weights,))
    return run_grid(lambda _: (config, params), config, cells, steps=steps, repeats=repeats)


def read_grid(cells: Any, source: str) -> list[Cell]:
    """Return the cells of a JSON list of objects with the fields of `Cell`; raises InputError, naming the source."""
    known = [field.name for field in dataclasses.fields(Cell)]
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InputError(f'{source} must be a JSON list of cells, such as [{{"batch": 1, "prompt": 32}}]')
    for cell in cells:
        for name, value in cell.items():
            if name not in known:
                raise UnknownNameError(f"axis in {source}", name, known)
            wanted = str if name in ("weights", "cache") else int
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise InputError(
                    f"{source}: {name}={value!r} must be {'a name' if wanted is str else 'a whole number'}"
                )
    return [Cell(**cell) for cell in cells]


def check_grid(config: ModelConfig, cells: Sequence[Cell], steps: int, repeats: int) -> None:
    """Raise InputError for a cell that cannot run, before anything is measured."""
    check_is_decoder(config, "bench decode")
    if not cells:
        raise InputError("the grid has no cells")
    check_at_least_one(repeats=repeats)
    for cell in cells:
        check_cell(config, cell, steps)
        dtype_name(cell.weights, KINDS, "weight type")
        if cell.cache is not None:
            dtype_name(cell.cache, CACHE_DTYPES, "cache dtype")
        if cell.kv_heads is not None and (cell.kv_heads < 1 or config.num_heads % cell.kv_heads):
            raise InputError(f"kv_heads={cell.kv_heads} must divide num_heads={config.num_heads}")


def run_grid(
    build: Build,
    config: ModelConfig,
    cells: Sequence[Cell],
    *,
    steps: int,
    repeats: int,
    stopped: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per cell, in order: its coordinates, `cells.measure`, its bytes and FLOPs.

    A cell that fails (out of memory, a defect) has "error" in its row and does not stop the others. On Ctrl-C `stopped`
    is called, the rows so far are returned and the rest is left out; without it, KeyboardInterrupt is raised.
    Raises InputError on a grid that cannot run.
    """
    check_grid(config, cells, steps, repeats)
    models = _Models(build)
    rows: list[dict[str, Any]] = []
    with progress_bar("decode benchmark", len(cells)) as advance:
        for cell in cells:
            try:
                rows.append(_row(models, cell, steps, repeats))
            except KeyboardInterrupt:
                if stopped is None:
                    raise
                stopped()
                break
            advance()
    return rows


def _row(models: "_Models", cell: Cell, steps: int, repeats: int) -> dict[str, Any]:
    place = dataclasses.asdict(cell) | {"context": cell.depth, "steps": steps, "repeats": repeats}
    try:
        config, params = models.get(cell)
        place |= {"cache": cell.cache or config.compute_dtype, "kv_heads": config.num_kv_heads}
        return place | measure(config, params, cell, steps, repeats) | step_cost(config, params, cell, steps)
    except Exception as error:  # a cell may fail in any way: the grid continues
        models.forget()
        words = " ".join(str(error).split())
        return place | {"error": f"{type(error).__name__}: {words[:500]}"}


class _Models:
    """The prepared parameters of the current cell; those of other cells are released, as both may not fit."""

    def __init__(self, build: Build):
        self.build = build
        self.key: tuple[int | None, str] | None = None
        self.model: tuple[ModelConfig, Params] | None = None

    def get(self, cell: Cell) -> tuple[ModelConfig, Params]:
        key = (cell.kv_heads, cell.weights)
        if key != self.key:
            self.forget()
            config, params = self.build(cell.kv_heads)
            prepared = prepare(config, params, cell.weights)
            self.key, self.model = key, (config, jax.block_until_ready(prepared))
        assert self.model is not None
        return self.model

    def forget(self) -> None:
        """Release the parameters."""
        self.key = self.model = None

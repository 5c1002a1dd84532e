"""Compare our generation with other programs: same weights and prompts, interleaved rounds on one machine."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench.ceilings import cores
from experiments.bench.decode.cells import Cell
from experiments.bench.peers.child import Child, python_has
from experiments.bench.peers.gguf_out import write_gguf
from experiments.bench.rounds import interleaved, median_and_range
from infer import Sampling, prepare, stream
from infer.decode import ROOM
from model import ModelConfig, Params
from model.convert import save_hf
from model.errors import InputError

PEER = Path(__file__).parents[1] / "peers/decode_peer.py"
PEERS = {  # module that it needs, and the environment variable with the path of a Python that has it
    "transformers": ("transformers", "ISOFLOP_TRANSFORMERS_PYTHON"),
    "torch": ("transformers", "ISOFLOP_TORCH_PYTHON"),
    "llama.cpp": ("llama_cpp", "ISOFLOP_LLAMA_PYTHON"),
}
CONVENTION = (
    "greedy; each turn generates all tokens from the prompt on, making its cache within the time; seconds_per_step is "
    "(time of all − time to the first) / (tokens − 1)"
)


class TimedGeneration(NamedTuple):
    """The tokens that a contender generated in one turn, and the time that it took."""

    first_seconds: float
    """Seconds to the first token."""
    all_seconds: float
    """Seconds to the last token."""
    tokens: list[list[int]]


Turn = Callable[[], TimedGeneration]
"""Generate once."""


def bench_against(
    model: tuple[ModelConfig, Params], cells: Sequence[Cell], names: Sequence[str], *, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Return one row per (batch, prompt) of the cells and program, ours first; a failure is the row's "error".

    All compute in the precision of the cell's weights, float32 or bfloat16.

    Raises InputError before anything is measured: where a program is not installed, and on cells whose precision the
    others do not have (weights float32 or bfloat16, the cache as the model computes, the context the prompt).
    """
    config, params = model
    _check(config, cells, names, steps, rounds)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isoflop-peers-")))
        for dtype in dict.fromkeys(cell.weights for cell in cells):
            with contextlib.ExitStack() as children:
                peers = {name: _start(children, name, config, params, dtype, folder) for name in names}
                shape = config.replace(compute_dtype=dtype)
                prepared = prepare(shape, params, dtype)
                for batch, prompt in dict.fromkeys((c.batch, c.prompt) for c in cells if c.weights == dtype):
                    cell = Cell(batch, prompt, weights=dtype)
                    try:
                        rows += _measure(shape, prepared, cell, peers, steps, rounds)
                    except Exception as error:  # our own side failed: nothing to compare in this cell
                        rows.append(_place(cell, dtype, steps, rounds) | {"contender": "isoflop", "error": repr(error)})
    return rows


def _start(
    stack: contextlib.ExitStack, name: str, config: ModelConfig, params: Params, dtype: str, folder: Path
) -> Child | str:
    """Return the program with these weights loaded, or the reason why it cannot load them."""
    path = folder / ("model.gguf" if name == "llama.cpp" else "model")
    try:
        if name == "llama.cpp":
            if dtype != "float32":
                raise InputError(f"llama.cpp is compared in float32 only, not in {dtype}")
            write_gguf(config, params, path)
        elif not path.exists():
            save_hf(config, params, path)
        spec = {
            "name": name,
            "path": str(path),
            "dtype": dtype,
            "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
            "threads": cores() if jax.default_backend() == "cpu" else None,
        }
        child = Child([_python(name), str(PEER), json.dumps(spec)], name, folder / f"{name}-{dtype}.log")
        return stack.enter_context(child)
    except InputError as error:
        return str(error)


def _measure(
    config: ModelConfig, params: Params, cell: Cell, peers: dict[str, Child | str], steps: int, rounds: int
) -> list[dict[str, Any]]:
    shape = (cell.batch, cell.prompt)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    turns: dict[str, Turn] = {"isoflop": ours(config, params, prompts, steps)}
    start = time.perf_counter()
    turns["isoflop"]()
    about: dict[str, dict[str, Any]] = {"isoflop": {"warm_up_seconds": time.perf_counter() - start}}
    for name, peer in peers.items():
        try:
            if isinstance(peer, str):
                raise InputError(peer)
            told = {"do": "cell", "tokens": prompts.tolist(), "steps": steps}
            answer = _asked(peer, told)
            about[name] = {"warm_up_seconds": answer["seconds"], "note": answer["note"], **peer.ready["versions"]}
            turns[name] = functools.partial(_theirs, peer)
        except InputError as error:
            about[name] = {"error": str(error)}
    answers, failed = answers_by_round(turns, rounds)
    about |= {name: about[name] | {"error": words} for name, words in failed.items()}
    place = _place(cell, config.compute_dtype, steps, rounds)
    return [
        place | {"contender": name} | about[name] | ({} if "error" in about[name] else summarize(name, answers))
        for name in about
    ]


def _place(cell: Cell, dtype: str, steps: int, rounds: int) -> dict[str, Any]:
    own = {"context": cell.depth, "cache": dtype, "steps": steps, "rounds": rounds}
    return dataclasses.asdict(cell) | own


def ours(config: ModelConfig, params: Params, prompts: np.ndarray, steps: int) -> Turn:
    """Return a function that runs `infer.generate` once and records the time of the first token."""
    rows = prompts.tolist()
    greedy = Sampling(temperature=0.0, stop_ids=())

    def turn() -> TimedGeneration:
        start = time.perf_counter()
        pieces = stream(config, params, rows, greedy, max_new_tokens=steps, every=ROOM)
        made = next(pieces)  # the same list throughout
        first = time.perf_counter() - start
        for _ in pieces:
            pass
        return TimedGeneration(first, time.perf_counter() - start, [row.tokens for row in made])

    return turn


def _theirs(peer: Child) -> TimedGeneration:
    """Take a peer's turn."""
    answer = _asked(peer, {"do": "run"})
    return TimedGeneration(answer["first"], answer["all"], answer["tokens"])


def answers_by_round(turns: dict[str, Turn], rounds: int) -> tuple[dict[str, list[TimedGeneration]], dict[str, str]]:
    """Return (answers of every contender, reasons of the contenders that stopped)."""
    answers: dict[str, list[TimedGeneration]] = {name: [] for name in turns}
    failed: dict[str, str] = {}
    for name in interleaved(list(turns), rounds):
        if name not in failed:
            try:
                answers[name].append(turns[name]())
            except InputError as error:
                failed[name] = str(error)
    return answers, failed


def summarize(name: str, answers: dict[str, list[TimedGeneration]]) -> dict[str, Any]:
    """Return a contender's median and range, our speed relative to it by round, and the agreement of its tokens."""
    first, step = _times(answers[name])
    our_first, our_step = _times(answers["isoflop"])
    mine, theirs = (np.array(answers[of][-1].tokens) for of in ("isoflop", name))
    equal = mine == theirs
    differing = np.flatnonzero(~equal.all(axis=0))
    row: dict[str, Any] = {
        "time_to_first_token_seconds": float(np.median(first)),
        "seconds_per_step": float(np.median(step)),
        "seconds_per_step_slowest": float(step.max()),
        "seconds_per_step_fastest": float(step.min()),
        "decode_tokens_per_second_aggregate": float(len(mine) / np.median(step)),
        "tokens": int(equal.size),
        "tokens_equal": int(equal.sum()),
        "first_difference": int(differing[0]) if differing.size else None,
        "samples": {"time_to_first_token_seconds": first.tolist(), "seconds_per_step": step.tolist()},
    }
    for of, ratios in (("decode", step / our_step), ("first_token", first / our_first)):
        row |= median_and_range(f"isoflop_over_this_{of}", ratios.tolist())
    return row


def _times(answers: list[TimedGeneration]) -> tuple[np.ndarray, np.ndarray]:
    """Return (seconds to the first token, seconds of every later one) by round."""
    first = np.array([answer.first_seconds for answer in answers])
    whole = np.array([answer.all_seconds for answer in answers])
    return first, (whole - first) / (len(answers[0].tokens[0]) - 1)


def _asked(peer: Child, told: dict[str, Any]) -> dict[str, Any]:
    answer = peer.ask(json.dumps(told))
    if "error" in answer:
        raise InputError(answer["error"])
    return answer


def _python(name: str) -> str:
    return os.environ.get(PEERS[name][1]) or sys.executable


def _check(config: ModelConfig, cells: Sequence[Cell], names: Sequence[str], steps: int, rounds: int) -> None:
    if rounds < 1 or steps < 2:
        raise InputError(f"--against needs at least one round and two steps, not rounds={rounds}, steps={steps}")
    for cell in cells:
        if cell.weights not in ("float32", "bfloat16"):
            raise InputError(f"--against compares float32 or bfloat16 weights, not {cell.weights}")
        if cell.depth != cell.prompt or cell.cache not in (None, cell.weights) or cell.kv_heads is not None:
            raise InputError(
                "--against decodes the unmodified model after the prompt: leave out --context, --cache, --kv-heads"
            )
    for name in names:
        module, variable = PEERS[name]
        if not python_has(_python(name), module):
            raise InputError(f"{_python(name)} has no {module}: name a Python that has it in {variable}")

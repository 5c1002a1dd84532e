"""Log-probabilities of given continuations: `infer.score`, in a module of another name so that it stays the function.

A package's attribute of a submodule's name becomes that module once it is imported.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer.batches import Batch, Limits, Plan, Prefix, Row, Shape, plan_branches, plan_rows, tokens_read
from infer.prefixes import Branch, branches
from infer.prepare import prepare
from infer.score_step import read_prefixes, score_rows
from model import Execution, KVCache, ModelConfig, Params
from model.checks import check_at_least_one, check_whole
from model.errors import InputError
from model.progress import progress_bar
from model.sharding import make_mesh, parts_of, shardings, under_mesh_of

_Ids = tuple[np.ndarray, np.ndarray]  # of a context and a continuation
WORTH_BRANCHING = 0.8  # of the tokens that are read without sharing; with more than this, prefixes are not shared
_AHEAD = 2  # batches that the device works on while the host reads an earlier one
_QUIET_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry per request, in the order of the requests.

    logprobs: natural, of the whole continuation. tokens: of each of its tokens, float32. greedy: whether each of its
    tokens is the likeliest in its place (of equally likely ones that with the smallest id). top_logprobs: of every
    token {id: log-probability} of the likeliest ones in its place, the best first; empty without `top_k`.
    """

    logprobs: np.ndarray  # float64 [requests]
    tokens: list[list[float]]
    greedy: np.ndarray  # bool [requests]
    top_logprobs: list[list[dict[int, float]]] = dataclasses.field(default_factory=list)


def score(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Any],
    *,
    batch_size: int = 16,
    top_k: int = 0,
    share_prefixes: bool = True,
    execution: Execution = Execution(),
) -> Scores:
    """Return the log-probability of every continuation after its context, for pairs (context ids, continuation ids).

    An empty context stands for the first of the config's `eos_token_ids`, as in lm-evaluation-harness for models
    without a token that begins a text. Of an encoder-decoder the encoder reads the context, and the decoder the
    continuation after `decoder_start_token_id`.

    batch_size: rows of a pass, rounded up to what a mesh divides and to whole groups of rows after one prefix. top_k:
    gives `top_logprobs`. share_prefixes: what contexts begin with in common is read once into a cache, from which they
    branch, where that saves a fifth of the work; False: never. execution: its mesh, if it has one, is the one over
    which params are placed; else the programs run where params lie, prepared (`prepare`) or not. Over several processes
    each of them calls with the same requests and gets all results.

    A call compiles at most four programs; lengths are rounded up, so that most calls share them. Batches depend on the
    set of requests alone: their order changes no bit, nor does what stands in padding. Another batch_size, other
    requests beside it or another sharing change a result by rounding.
    Raises InputError for a model that predicts no next token, and names the first request that cannot be scored.
    """
    _check_options(config, batch_size, top_k)
    batch_size, top_k = int(batch_size), int(top_k)
    pairs = _checked(config, requests)
    params = _placed(config, params, execution)
    key = lambda pair: (pair[0].tobytes(), pair[1].tobytes())
    unique = {key(pair): pair for pair in pairs}  # equal requests are scored once
    numbers = {one: number for number, one in enumerate(unique)}
    with under_mesh_of(params):
        parts = parts_of("batch")
        limits = Limits(-(-batch_size // parts) * parts, parts, config.max_seq_len)
        plan_for = _plan_sources if config.stack == "encoder-decoder" else _plan_decoder
        plan = plan_for(config, list(unique.values()), limits, share_prefixes)
        found: dict[int, tuple[np.ndarray, ...]] = {}
        steps = _batches(config, params, plan, top_k, execution)
        for rows, made in _with_bar(steps, sum(len(batches) for _, batches in plan)):
            for place, row in rows.items():
                found[row.number] = tuple(array[place, : len(row.targets)] for array in made)
    return _scores([found[numbers[key(pair)]] for pair in pairs], top_k)


def _scores(found: Sequence[tuple[np.ndarray, ...]], top_k: int) -> Scores:
    likeliest = lambda ids, logprobs: [
        dict(zip(one.tolist(), values.tolist(), strict=True)) for one, values in zip(ids, logprobs, strict=True)
    ]
    return Scores(
        logprobs=np.array([one[0].sum(dtype=np.float64) for one in found], np.float64),
        tokens=[one[0].tolist() for one in found],
        greedy=np.array([bool(one[1].all()) for one in found], bool),
        top_logprobs=[likeliest(*one[2:]) for one in found] if top_k else [],
    )


# ---- what is scored


def _check_options(config: ModelConfig, batch_size: int, top_k: int) -> None:
    if config.head != "language-model" or config.stack == "encoder":
        raise InputError(
            f"a model with stack={config.stack!r} and head={config.head!r} predicts no next token; score needs a "
            "decoder or an encoder-decoder with head='language-model'"
        )
    check_at_least_one(batch_size=batch_size)
    check_whole("top_k", top_k, 0, config.vocab_size, hint="the vocabulary has no more tokens")


def _checked(config: ModelConfig, requests: Iterable[Any]) -> list[_Ids]:
    """The requests as int32 arrays, an empty context filled in. Raises InputError as `score` does."""
    pairs = []
    for number, request in enumerate(requests):
        if isinstance(request, str) or not hasattr(request, "__len__") or len(request) != 2:
            raise InputError(f"request {number} is {request!r:.60}; give (context ids, continuation ids)")
        context, continuation = (
            _ids(config, number, name, ids) for name, ids in zip(("context", "continuation"), request, strict=True)
        )
        if not len(continuation):
            raise InputError(f"request {number} has an empty continuation; give it at least one token to score")
        if not len(context):
            if not config.eos_token_ids:
                raise InputError(
                    f"request {number} has an empty context and the config no eos_token_ids to stand for it; "
                    "give the context a token that begins a text"
                )
            context = np.array(config.eos_token_ids[:1], np.int32)
        _check_fits(config, number, len(context), len(continuation))
        pairs.append((context, continuation))
    return pairs


def _ids(config: ModelConfig, number: int, name: str, ids: Any) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of several lengths
        array = np.zeros((1, 1))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"request {number}: its {name} is {ids!r:.60}; give a flat list of token ids, whole numbers")
    wrong = (array < 0) | (array >= config.vocab_size)
    if wrong.any():
        raise InputError(
            f"request {number}: its {name} has the id {array[wrong.argmax()]}, outside the vocabulary of "
            f"{config.vocab_size}; was it encoded with this model's tokenizer?"
        )
    return array.astype(np.int32)


def _check_fits(config: ModelConfig, number: int, context: int, continuation: int) -> None:
    most = config.max_seq_len
    if config.stack == "encoder-decoder":
        for name, length in (("context", context), ("continuation", continuation)):
            if length > most:
                raise InputError(
                    f"request {number}: its {name} of {length} tokens is longer than max_seq_len={most}; shorten it"
                )
    elif context + continuation - 1 > most:
        raise InputError(
            f"request {number}: {context} tokens of context and {continuation} of continuation, the last of which is "
            f"not read, do not fit max_seq_len={most}; leave out tokens at the beginning of the context"
        )


def _placed(config: ModelConfig, params: Params, execution: Execution) -> Params:
    """The parameters as arrays of a device, or of the execution's mesh."""
    if execution.mesh is None:
        return jax.device_put(params)  # arrays of devices stay where they lie
    mesh = make_mesh(execution.mesh, execution.platform)
    if isinstance(params["layers"], tuple):
        return prepare(config, params, mesh=mesh)  # what is prepared keeps its form
    return jax.device_put(params, shardings(mesh, params))


# ---- in which batches


def _plan_sources(config: ModelConfig, pairs: Sequence[_Ids], limits: Limits, share: bool) -> Plan:
    """Every context is a prefix; shared or not, those that are equal are one or several."""
    prefixes: dict[Any, Prefix] = {}
    for number, (context, continuation) in enumerate(pairs):
        tokens = np.concatenate([[config.decoder_start_token_id], continuation[:-1]]).astype(np.int32)
        prefix = prefixes.setdefault(context.tobytes() if share else number, Prefix(context, []))
        prefix.rows.append(Row(number, tokens, continuation))
    return plan_branches(prefixes.values(), [], limits)


def _plan_decoder(config: ModelConfig, pairs: Sequence[_Ids], limits: Limits, share: bool) -> Plan:
    rows = [Row(number, np.concatenate([*pair])[:-1], pair[1]) for number, pair in enumerate(pairs)]
    apart = plan_rows(rows, limits)
    if not share:
        return apart
    rows.sort(key=lambda row: (row.tokens.astype(">i4").tobytes(), row.targets.tobytes()))
    # The last token of a context is read with the continuation: it predicts the first one.
    choices = branches([row.tokens for row in rows], [len(row.tokens) - len(row.targets) for row in rows])
    plans = [_plan_branches(rows, choice, limits) for choice in choices if choice]
    best = min(plans, key=tokens_read, default=apart)
    return best if tokens_read(best) <= WORTH_BRANCHING * tokens_read(apart) else apart


def _plan_branches(rows: Sequence[Row], choice: Sequence[Branch], limits: Limits) -> Plan:
    stems: dict[bytes, np.ndarray] = {}
    prefixes, left = [], set(range(len(rows)))
    for branch in choice:
        members = range(branch.low, branch.high)
        left.difference_update(members)
        tokens = rows[branch.low].tokens
        stem = tokens[: branch.stem]
        stem = stems.setdefault(stem.tobytes(), stem)  # one array for all
        below = [rows[row]._replace(tokens=rows[row].tokens[branch.prefix :]) for row in members]
        prefixes.append(Prefix(tokens[branch.stem : branch.prefix], below, stem if branch.stem else None))
    return plan_branches(prefixes, [rows[row] for row in sorted(left)], limits)


# ---- on the device


def _batches(
    config: ModelConfig, params: Params, plan: Plan, top_k: int, execution: Execution
) -> Iterator[tuple[dict[int, Row], tuple[np.ndarray, ...]]]:
    """The rows of every batch by place, and arrays of what was found there, some batches after they were sent off."""
    sent: list[tuple[dict[int, Row], Any]] = []

    def send(shape: Shape, rows: Mapping[int, Row], *prefixes: Any) -> tuple[jax.Array, ...]:
        tokens, lengths = _padded({place: row.tokens for place, row in rows.items()}, shape.rows, shape.width)
        targets, counts = _padded({place: row.targets for place, row in rows.items()}, shape.rows, shape.targets)
        rows_and_targets = (tokens, lengths, targets, lengths - counts)
        return score_rows(config, params, *rows_and_targets, *prefixes, top_k=top_k, execution=execution)

    for shape, batches in plan:
        reader = _Reader(config, params, shape, execution)
        for batch in batches:
            rows = {
                number * shape.size + place: row
                for number, group in enumerate(batch.groups)
                for place, row in enumerate(group)
            }
            sent.append((rows, send(shape, rows, *reader.read(batch))))
            if len(sent) > _AHEAD:
                rows, made = sent.pop(0)
                yield rows, jax.device_get(made)
    for rows, made in sent:
        yield rows, jax.device_get(made)


class _Reader:
    """Reads the prefixes of batches, and keeps those of the last batch and their stem."""

    def __init__(self, config: ModelConfig, params: Params, shape: Shape, execution: Execution):
        self._read = functools.partial(read_prefixes, config, execution=execution)
        self._params, self._shape = params, shape
        self._stem: tuple[np.ndarray | None, KVCache | None] = (None, None)
        self._prefixes: tuple[list[Prefix], KVCache | None] = ([], None)

    def read(self, batch: Batch) -> tuple[KVCache, np.ndarray] | tuple[()]:
        """The cache of a batch's prefixes, one row each, and which of them each group has; nothing for whole rows."""
        if not batch.prefixes:
            return ()
        shape, stem = self._shape, batch.prefixes[0].stem
        if stem is not None and stem is not self._stem[0]:
            padded = _padded({0: stem}, 1, shape.stem_width)
            self._stem = stem, self._read(self._params, *padded, capacity=shape.stem_width)
        if batch.prefixes != self._prefixes[0]:
            tokens = {place: prefix.tokens for place, prefix in enumerate(batch.prefixes)}
            padded = _padded(tokens, shape.prefixes, shape.prefix_width)
            cache = self._read(self._params, *padded, self._stem[1], capacity=shape.capacity)
            self._prefixes = batch.prefixes, cache
        assert self._prefixes[1] is not None
        parents = np.zeros(shape.groups, np.int32)
        parents[: len(batch.parents)] = batch.parents
        return self._prefixes[1], parents


def _padded(rows: Mapping[int, np.ndarray], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in their places of int32 [size, width], padded with 0, and the lengths."""
    padded, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    for place, row in rows.items():
        padded[place, : len(row)], lengths[place] = row, len(row)
    return padded, lengths


def _with_bar(steps: Iterator, total: int) -> Iterator:
    """The same steps, with a progress bar once they have taken more than two seconds; of processes the first has it."""
    start, advance = time.perf_counter(), None
    with contextlib.ExitStack() as stack:
        for done, step in enumerate(steps, 1):
            yield step
            if advance is not None:
                advance()
            elif done < total and jax.process_index() == 0 and time.perf_counter() - start > _QUIET_SECONDS:
                advance = stack.enter_context(progress_bar("scoring", total))
                advance(done)

"""Score continuations: plan the batches, run their programs, and collect the log-probabilities."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from infer.prepare import prepare
from infer.scoring.batches import Batch, BatchPlan, BatchShape, Limits, Prefix
from infer.scoring.packing import PackedBatch, PackedPlan, PackedShape, Place, packed_arrays
from infer.scoring.planning import plan_decoder, plan_encoder_decoder
from infer.scoring.programs import read_prefixes, score_packed, score_rows
from infer.scoring.requests import IdPair, check_options, id_pairs
from model import Execution, KVCache, ModelConfig, Params
from model.progress import progress_bar
from model.sharding import make_mesh, parts_of, shardings, under_mesh_of

_AHEAD = 2  # batches that the device works on while the host reads an earlier one
_QUIET_SECONDS = 2.0  # before a progress bar is shown


@dataclasses.dataclass(frozen=True)
class Scores:
    """One entry per request, in the order of the requests.

    logprobs: natural log-probability of the whole continuation. tokens: of each of its tokens, float32. greedy: True if
    each of its tokens is the most likely at its position; of equally likely tokens the one with the smallest id.
    top_logprobs: per token {id: log-probability} of the most likely tokens at its position, best first; empty if top_k
    is 0.
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
    """Return the log-probability of every continuation after its context.

    requests: pairs (context ids, continuation ids). An empty context stands for the first of the config's
    `eos_token_ids`, as in lm-evaluation-harness for models without a token that begins a text. For an encoder-decoder
    the encoder reads the context, and the decoder the continuation after `decoder_start_token_id`.

    batch_size: rows per pass, rounded up to a multiple that the mesh divides, and to whole groups of rows with a common
    prefix; packed rows have at most as many tokens as that many of the longest requests. top_k: number of most likely
    tokens in `top_logprobs`. share_prefixes: read common prefixes of contexts once, in rows packed with several
    requests or into a cache, where that saves a fifth of the work; False: never. execution: if it has a mesh, params
    are placed over it; otherwise the programs run where params are, prepared (`prepare`) or not. With several
    processes, each calls with the same requests and gets all results.

    A call compiles at most four programs; lengths are rounded up, so that most calls share them. Batches depend on the
    set of requests only: neither their order nor the padding changes any bit. Another batch_size, other requests in the
    call or other sharing change a result by rounding.
    Raises InputError for a model that predicts no next token, and names the first request that cannot be scored.
    """
    check_options(config, batch_size, top_k)
    batch_size, top_k = int(batch_size), int(top_k)
    pairs = id_pairs(config, requests)
    params = _placed(config, params, execution)
    unique = {_pair_key(pair): pair for pair in pairs}  # equal requests are scored once
    number_of = {key: number for number, key in enumerate(unique)}
    with under_mesh_of(params):
        parts = parts_of("batch")
        limits = Limits(-(-batch_size // parts) * parts, parts, config.max_seq_len)
        if config.stack == "encoder-decoder":
            plan: BatchPlan | PackedPlan = plan_encoder_decoder(config, list(unique.values()), limits, share_prefixes)
        else:
            plan = plan_decoder(list(unique.values()), limits, share_prefixes)
        found: dict[int, tuple[np.ndarray, ...]] = {}
        scored = _run_batches(config, params, plan, top_k, execution)
        for places, arrays in _with_progress_bar(scored, sum(len(batches) for _, batches in plan)):
            for place in places:
                here = slice(place.first, place.first + place.scored)
                found[place.number] = tuple(array[place.row, here] for array in arrays)
    return _scores([found[number_of[_pair_key(pair)]] for pair in pairs], top_k)


def _pair_key(pair: IdPair) -> tuple[bytes, bytes]:
    context, continuation = pair
    return context.tobytes(), continuation.tobytes()


def _scores(found: Sequence[tuple[np.ndarray, ...]], top_k: int) -> Scores:
    """Return the scores from the outputs of `score_rows` for each request."""
    top_logprobs = []
    if top_k:
        for _, _, ids, logprobs in found:
            pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
            top_logprobs.append([dict(zip(*pair, strict=True)) for pair in pairs])
    return Scores(
        logprobs=np.array([one[0].sum(dtype=np.float64) for one in found], np.float64),
        tokens=[one[0].tolist() for one in found],
        greedy=np.array([bool(one[1].all()) for one in found], bool),
        top_logprobs=top_logprobs,
    )


def _placed(config: ModelConfig, params: Params, execution: Execution) -> Params:
    """Return the parameters as device arrays, over the execution's mesh if it has one."""
    if execution.mesh is None:
        return jax.device_put(params)  # device arrays stay where they are
    mesh = make_mesh(execution.mesh, execution.platform)
    if isinstance(params["layers"], tuple):
        return prepare(config, params, mesh=mesh)  # prepared parameters keep their form
    return jax.device_put(params, shardings(mesh, params))


def _run_batches(
    config: ModelConfig, params: Params, plan: BatchPlan | PackedPlan, top_k: int, execution: Execution
) -> Iterator[tuple[list[Place], tuple[np.ndarray, ...]]]:
    """Yield for every batch where the scores of its requests are, and the outputs of its program as host arrays.

    A batch is read on the host only after the next _AHEAD batches have been launched.
    """
    launched: list[tuple[list[Place], Any]] = []
    options: dict[str, Any] = {"top_k": top_k, "execution": execution}

    def launch_rows(shape: BatchShape, batches: Sequence[Batch]) -> Iterator[tuple[list[Place], Any]]:
        caches = _PrefixCaches(config, params, shape, execution)
        for batch in batches:
            rows = {}
            for number, group in enumerate(batch.groups):
                for place, row in enumerate(group):
                    rows[number * shape.size + place] = row
            tokens, lengths = _padded({place: row.tokens for place, row in rows.items()}, shape.rows, shape.width)
            targets, counts = _padded({place: row.targets for place, row in rows.items()}, shape.rows, shape.targets)
            # The last token predicts the last target: with 5 tokens and 2 targets, token 3 predicts the first target.
            first = lengths - counts
            outputs = score_rows(config, params, tokens, lengths, targets, first, *caches.read(batch), **options)
            yield [Place(row.number, place, 0, len(row.targets)) for place, row in rows.items()], outputs

    def launch_packed(shape: PackedShape, batches: Sequence[PackedBatch]) -> Iterator[tuple[list[Place], Any]]:
        stems = _StemCache(config, params, shape.stem_width, execution)
        for batch in batches:
            arrays, places = packed_arrays(batch, shape)
            yield places, score_packed(config, params, *arrays, stems.read(batch.stem), **options)

    for shape, batches in plan:
        if isinstance(shape, PackedShape):
            launches = launch_packed(shape, cast("list[PackedBatch]", batches))
        else:
            launches = launch_rows(shape, cast("list[Batch]", batches))
        for launch in launches:
            launched.append(launch)
            if len(launched) > _AHEAD:
                places, outputs = launched.pop(0)
                yield places, jax.device_get(outputs)
    for places, outputs in launched:
        yield places, jax.device_get(outputs)


class _StemCache:
    """The cache of one row of the last batch's stem, reused if the next batch has the same."""

    def __init__(self, config: ModelConfig, params: Params, width: int, execution: Execution):
        self._config, self._params, self._width, self._execution = config, params, width, execution
        self._stem: np.ndarray | None = None
        self._cache: KVCache | None = None

    def read(self, stem: np.ndarray) -> KVCache | None:
        """Return the cache of a stem; None if the shape has no stems."""
        if self._width and stem is not self._stem:
            padded, lengths = _padded({0: stem}, 1, self._width)
            self._cache = read_prefixes(
                self._config, self._params, padded, lengths, capacity=self._width, execution=self._execution
            )
            self._stem = stem
        return self._cache


class _PrefixCaches:
    """Caches of the last batch's prefixes and of their stem, reused if the next batch has the same."""

    def __init__(self, config: ModelConfig, params: Params, shape: BatchShape, execution: Execution):
        self._config, self._params, self._shape, self._execution = config, params, shape, execution
        self._stems = _StemCache(config, params, shape.stem_width, execution)
        self._prefixes: list[Prefix] = []
        self._prefix_cache: KVCache | None = None

    def read(self, batch: Batch) -> tuple[KVCache, np.ndarray] | tuple[()]:
        """Return the cache of a batch's prefixes, one row each, and each group's row in it; () for whole rows."""
        if not batch.prefixes:
            return ()
        shape, stem = self._shape, batch.prefixes[0].stem
        if batch.prefixes != self._prefixes:
            tokens = dict(enumerate(prefix.tokens for prefix in batch.prefixes))
            padded, lengths = _padded(tokens, shape.prefixes, shape.prefix_width)
            self._prefix_cache = read_prefixes(
                self._config,
                self._params,
                padded,
                lengths,
                None if stem is None else self._stems.read(stem),
                capacity=shape.capacity,
                execution=self._execution,
            )
            self._prefixes = batch.prefixes
        assert self._prefix_cache is not None
        parents = np.zeros(shape.groups, np.int32)
        parents[: len(batch.parents)] = batch.parents
        return self._prefix_cache, parents


def _padded(rows: Mapping[int, np.ndarray], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 [size, width] with the rows in their places, padded with 0, and the lengths."""
    padded, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    for place, row in rows.items():
        padded[place, : len(row)], lengths[place] = row, len(row)
    return padded, lengths


def _with_progress_bar(steps: Iterator, total: int) -> Iterator:
    """Yield the steps, with a progress bar on the first process once they have taken more than two seconds."""
    start, advance = time.perf_counter(), None
    with contextlib.ExitStack() as stack:
        for done, step in enumerate(steps, 1):
            yield step
            if advance is not None:
                advance()
            elif done < total and jax.process_index() == 0 and time.perf_counter() - start > _QUIET_SECONDS:
                advance = stack.enter_context(progress_bar("scoring", total))
                advance(done)

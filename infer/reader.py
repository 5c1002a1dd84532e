"""Read whole texts in blocks of few shapes: their embeddings, and the log-probabilities of their tokens."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from infer.prompts import SMALLEST_CHUNK, bucket
from infer.sampling import MOST_LOGPROBS
from infer.scoring.programs import scored_hidden
from model import Execution, KVCache, ModelConfig, Params, init_cache
from model.ambient import lenient
from model.errors import InputError
from model.transformer import encode, forward, forward_cached

Result = TypeVar("Result")
Score = tuple[float, dict[int, float]]
"""The log-probability of a token of a text, and those of the most likely tokens in its place."""
Run = Callable[[Callable[[], Any]], Any]
"""Calls a function of no arguments that computes one block, and returns its result."""
_SHORT = 512  # tokens, up to which a text is read in a small cache
_SMALLEST_ROW = 32  # tokens of an encoder's row


def directly(function: Callable[[], Result]) -> Result:
    """Call a function now: the `run` of a caller who has the device to themselves."""
    return function()


class Reader:
    """Reads one text at a time, a decoder's in blocks of `block` tokens.

    Every result depends on the text alone. The programs have few shapes (two widths of a block, two capacities of the
    cache, whether one or MOST_LOGPROBS of the most likely tokens are wanted; an encoder has one for each power of two),
    so that a text of any length compiles nothing once its programs are there. They are compiled outside of `run`, in
    the thread that calls. Any thread may call all methods.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        capacity: int | None = None,
        *,
        block: int = 64,
        execution: Execution = Execution(),
    ):
        """capacity: most tokens of a text; None: the context. block: rounded up to a power of two."""
        self.config, self.params, self.execution = config, jax.tree.map(jnp.asarray, params), execution
        self.capacity = min(capacity or config.max_seq_len, config.max_seq_len)
        self._block = bucket(block, SMALLEST_CHUNK)
        self._compiled: set[tuple[Any, ...]] = set()
        self._compiling = threading.Lock()

    def embedding(self, ids: Sequence[int], run: Run = directly) -> Float[np.ndarray, " d_model"]:
        """Return the mean of the final hidden states (after the final norm) of all tokens, scaled to norm 1, float32.

        An encoder-decoder's are those of its encoder. Raises InputError if the text is empty, longer than the
        capacity, or has ids outside the vocabulary.
        """
        self._check(ids)
        if self.config.stack != "decoder":
            total = self._encoded_sum(ids, run)
        else:
            total = np.zeros(self.config.d_model, np.float32)
            for tokens, lengths, cache in self._blocks(ids):
                part = self._call(run, _sum_block, tokens, lengths, cache)
                total = total + part[0]
        mean = np.asarray(total, np.float64) / len(ids)
        return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)

    def logprobs(self, ids: Sequence[int], count: int, run: Run = directly) -> list[Score | None]:
        """Return one entry per token; None for the first, which nothing predicts.

        count: number of most likely tokens, at most MOST_LOGPROBS. Raises InputError as `embedding`, and for a model
        that does not predict the next token of a text.
        """
        self._check(ids)
        if self.config.stack != "decoder" or self.config.head != "language-model":
            raise InputError("only a decoder with head='language-model' predicts the tokens of a text")
        top_k = min(1 if count <= 1 else MOST_LOGPROBS, self.config.vocab_size)
        scores: list[Score | None] = [None]
        for begin, (tokens, lengths, cache) in zip(
            range(0, len(ids), self._block), self._blocks(ids[:-1]), strict=False
        ):
            real = int(lengths[0])
            targets = np.zeros_like(tokens)
            targets[0, :real] = ids[begin + 1 : begin + 1 + real]
            part = self._call(run, _score_block, tokens, lengths, cache, targets, top_k=top_k)
            logprobs, _, top_ids, top = (array[0, :real] for array in part)
            for row in range(real):
                likeliest = zip(top_ids[row, :count].tolist(), top[row, :count].tolist(), strict=True)
                scores.append((float(logprobs[row]), dict(likeliest)))
        return scores

    def _check(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise InputError("the text has no tokens; give at least one")
        if len(ids) > self.capacity:
            raise InputError(f"the text has {len(ids)} tokens, more than the {self.capacity} that are read at most")
        wrong = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise InputError(
                f"the text has the token id {wrong}; ids are 0 to {self.config.vocab_size - 1} in this model"
            )

    def _blocks(self, ids: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray, list[KVCache]]]:
        """Yield padded tokens [1, width], their number [1], and the cell with the cache that a program replaces."""
        capacity = min(_SHORT, self.capacity) if len(ids) <= _SHORT else self.capacity
        cell: list[KVCache] = []
        cell.append(_empty(self.config, capacity))
        for begin in range(0, len(ids), self._block):
            part = ids[begin : begin + self._block]
            width = SMALLEST_CHUNK if len(part) <= SMALLEST_CHUNK else self._block
            yield _padded(part, width), np.array([len(part)], np.int32), cell

    def _call(self, run: Run, program: Any, tokens: Any, lengths: Any, cell: list[KVCache], *more: Any, **static: Any):
        """Run a program on one block, and return its results on the host."""

        def compute(cache: KVCache) -> tuple[Any, KVCache]:
            arguments = (self.config, self.params, tokens, lengths, cache, *more)
            results, cache = program(*arguments, execution=self.execution, **static)
            return jax.device_get(results), cache

        key = (program, tokens.shape, cell[0].capacity, *static.items())
        self._compile(key, lambda: compute(_empty(self.config, cell[0].capacity)))
        results, cell[0] = run(lambda: compute(cell[0]))
        return results

    def _encoded_sum(self, ids: Sequence[int], run: Run) -> np.ndarray:
        tokens = _padded(ids, min(bucket(len(ids), _SMALLEST_ROW), self.config.max_seq_len))
        lengths = np.array([len(ids)], np.int32)

        def compute() -> np.ndarray:
            return jax.device_get(_sum_row(self.config, self.params, tokens, lengths, execution=self.execution))[0]

        self._compile((_sum_row, tokens.shape), compute)
        return run(compute)

    def _compile(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> None:
        """Compute once outside of `run`, which compiles, unless that was done."""
        if key not in self._compiled:
            with self._compiling:
                if key not in self._compiled:
                    compute()
                    self._compiled.add(key)


def _padded(ids: Sequence[int], width: int) -> Int[np.ndarray, "1 width"]:
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(config: ModelConfig, capacity: int) -> KVCache:
    return init_cache(config, 1, capacity)


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution", donate_argnums=4)
@lenient()
def _sum_block(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "1 width"],
    lengths: Int[Array, " 1"],
    cache: KVCache,
    *,
    execution: Execution,
) -> tuple[Float[Array, "1 d_model"], KVCache]:
    """Return the sum of the final hidden states of a block, and the cache with the block."""
    hidden, cache = forward_cached(config, params, tokens, lengths, cache, every=True, execution=execution)
    return _sum(hidden, lengths), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top_k", "execution"), donate_argnums=4)
@lenient()
def _score_block(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "1 width"],
    lengths: Int[Array, " 1"],
    cache: KVCache,
    targets: Int[Array, "1 width"],
    *,
    top_k: int,
    execution: Execution,
) -> tuple[tuple[Array, ...], KVCache]:
    """Score the token after each of a block (see `scored_hidden`), and return the cache with the block."""
    hidden, cache = forward_cached(config, params, tokens, lengths, cache, every=True, execution=execution)
    predicting = jnp.arange(tokens.shape[1])[None]
    return scored_hidden(config, params, hidden, targets, predicting, top_k, execution), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
@lenient()
def _sum_row(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "1 width"],
    lengths: Int[Array, " 1"],
    *,
    execution: Execution,
) -> Float[Array, "1 d_model"]:
    """Return the sum of an encoder's final hidden states."""
    if config.experts is not None:
        config = config.replace(experts=config.experts.replace(dispatch="dropless"))
    segment_ids = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    options: Mapping[str, Any] = {"segment_ids": segment_ids, "execution": execution}
    if config.stack == "encoder-decoder":
        return _sum(encode(config, params, tokens, **options), lengths)
    hidden = forward(config, params, tokens, outputs=("final_hidden",), **options).final_hidden
    assert hidden is not None
    return _sum(hidden, lengths)


def _sum(hidden: Float[Array, "1 width d_model"], lengths: Int[Array, " 1"]) -> Float[Array, "1 d_model"]:
    real = jnp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return jnp.sum(jnp.where(real, hidden.astype(jnp.float32), 0), axis=1)

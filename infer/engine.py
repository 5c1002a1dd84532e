"""Continuous batching: requests come at any time, share one decode program, and leave when they are done."""

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from infer.decode import ROOM, RUNNING, STOPPED, Emitted, Rows, begin, decode
from infer.generate import words_after
from infer.prompts import SMALLEST_CHUNK, Prompt, bucket, check_generates, check_prompts, decoder_prompts
from infer.request import Reading, Request
from infer.sampler import History, SamplerState, row_keys
from infer.sampling import GREEDY, Sampling
from infer.step import prefill
from infer.text import Decoder
from model import Execution, KVCache, ModelConfig, Params, init_cache
from model.accounting import kv_cache_bytes
from model.ambient import lenient
from model.cache import CACHE_DTYPES
from model.checks import check_at_least_one, check_whole
from model.dtypes import DTypeLike, dtype_name
from model.errors import InputError
from model.sharding import under_mesh_of

MOST_STOP_IDS = 32  # of one request, so that all share one program


class Engine:
    """Rows of one cache, each serving one request after another.

    A request's output is that of `generate([prompt], sampling, key=key)`, whoever runs beside it and whenever it came
    (Yu et al. 2022, Orca: iteration-level scheduling). Prompts are read in the order of submission into a cache of
    their own and put into a free row; of a step's work they take at most `chunk` tokens, so that running rows never
    wait longer than that (Agrawal et al. 2024, Sarathi-Serve). The host reads a step's tokens while the device works on
    the next. Not for several threads at once.
    """

    @lenient()
    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        slots: int = 8,
        capacity: int = 1024,
        cache_dtype: DTypeLike | None = None,
        cache_bytes: int | None = None,
        steps: int = 8,
        chunk: int = 256,
        tokenizer: Decoder | None = None,
        key: PRNGKeyArray | None = None,
        clock: Callable[[], float] = time.perf_counter,
        execution: Execution = Execution(),
    ):
        """slots: requests that run at a time. capacity: tokens of prompt and output that a request can have, at most
        the context; of an encoder-decoder the encoder's prompt may have as many too. cache_dtype: see `init_cache`.

        cache_bytes: the slots' cache takes no more (fewer slots then); a prompt that is being read takes up to one
        slot's share besides. steps: tokens that every row decodes in a step, at most ROOM. chunk: of a prompt's tokens,
        rounded up to a power of two; an int8 cache rounds what earlier chunks wrote, so that longer prompts than this
        may then continue differently than in `generate`. key and execution: as `generate`'s.
        Raises InputError where a number is too small, and where not even one slot fits.
        """
        check_generates(config)
        check_at_least_one(slots=slots, capacity=capacity, chunk=chunk)
        check_whole("steps", steps, 1, ROOM)
        if cache_dtype is not None:
            cache_dtype = dtype_name(cache_dtype, CACHE_DTYPES, "cache dtype")  # a static argument: one program
        self.config, self.params, self.execution = config, jax.tree.map(jnp.asarray, params), execution
        self.capacity = min(capacity, config.max_seq_len)
        if cache_bytes is not None:
            each = kv_cache_bytes(config, 1, self.capacity, cache_dtype)
            slots = min(slots, cache_bytes // each)
            if slots < 1:
                raise InputError(
                    f"cache_bytes={cache_bytes:,} does not hold one request of capacity={self.capacity}, "
                    f"which takes {each:,} bytes; give more or a smaller capacity"
                )
        self.slots, self.steps, self.chunk = slots, steps, bucket(chunk, SMALLEST_CHUNK)
        self.tokenizer, self.clock, self._cache_dtype = tokenizer, clock, cache_dtype
        keys = row_keys([GREEDY], jax.random.key(0) if key is None else key)
        self._sampler = functools.lru_cache(8)(lambda one: SamplerState.create([one], keys, config.vocab_size))
        with under_mesh_of(self.params):
            self._rows = _empty_rows(config, slots, self.capacity, cache_dtype, keys[0])
        self._waiting: deque[Request] = deque()
        self._reading: Reading | None = None
        self._owners: list[Request | None] = [None] * slots  # None: the next request may have the row
        self._issued = [0] * slots  # tokens that the device was told to make of the owner's
        self._coming: tuple[list[Request | None], Emitted] | None = None
        self._cancelled: list[Request] = []

    def submit(self, prompt: Prompt, sampling: Sampling = Sampling(), max_new_tokens: int = 64) -> Request:
        """Queue a prompt (of an encoder-decoder the encoder's). Raises InputError at once if it can never be served:
        for what `generate` refuses, for more tokens than the capacity, n > 1 and more than MOST_STOP_IDS stop ids.
        """
        prompt = list(prompt)
        check_prompts(self.config, [prompt], max_new_tokens)
        if max(len(prompt), len(self._decoders(prompt)) + max_new_tokens) > self.capacity:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit the engine's "
                f"capacity={self.capacity}"
            )
        if sampling.n > 1:
            raise InputError(f"n={sampling.n} in one request; submit it {sampling.n} times, each with its own seed")
        if sampling.stop_strings and self.tokenizer is None:
            raise InputError(f"stop_strings={sampling.stop_strings!r} need the tokenizer; give Engine(…, tokenizer=…)")
        if len(self._stop_ids(sampling)) > MOST_STOP_IDS:
            raise InputError(f"{len(self._stop_ids(sampling))} stop ids in one request; give at most {MOST_STOP_IDS}")
        if sampling.logit_bias:
            self._sampler(sampling)  # raises for ids outside the vocabulary
        words = words_after(self.tokenizer, self._decoders(prompt), sampling)
        request = Request(sampling, words, prompt=prompt, max_new_tokens=max_new_tokens, submitted=self.clock())
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request where it is; its row is free from the next step on. An ended one stays as it ended."""
        if request.finish_reason is None:
            request.end("cancelled")
            request.finished = self.clock()
            self._cancelled.append(request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do or to read."""
        return not (self._waiting or self._reading or any(self._owners) or self._coming or self._cancelled)

    def run(self) -> None:
        """Step until all requests have ended."""
        while not self.idle:
            self.step()

    @lenient()
    def step(self) -> list[Request]:
        """Let requests in, decode up to `steps` tokens of every running one, read what the last step made.

        Returns the requests that got tokens or ended since the last step. Without work it does nothing.
        """
        changed, self._cancelled = self._cancelled, []
        self._forget_ended()
        with under_mesh_of(self.params):
            first = self._let_in()
            upcoming = self._decode()
        for owners, emitted in [*([self._coming] if self._coming else []), *first]:
            emitted = jax.device_get(emitted)
            now = self.clock()
            for row, request in enumerate(owners):
                if request is not None and request.receive(emitted, row, now):
                    changed.append(request)
        self._coming = upcoming
        self._forget_ended()
        return list(dict.fromkeys(changed))

    def warm_up(self, prompt_lengths: Sequence[int] | None = None) -> None:
        """Compile all that requests with prompts of these lengths need (None: of any length), whatever their settings.

        Lengths count by the power of two that holds them. Over a mesh a program may still be
        compiled later. Raises InputError unless the engine is idle.
        """
        if not self.idle:
            raise InputError("warm_up needs an idle engine; call it before the first request")
        most = self.capacity - (self.config.stack != "encoder-decoder")
        if prompt_lengths is None:
            prompt_lengths = [1 << power for power in range(most.bit_length())] + [most]
        widths = {self._width(length): min(length, most) for length in (1, *prompt_lengths)}
        for length in widths.values():
            room = self.capacity - len(self._decoders([0] * length))
            for settings in ({}, {"seed": 0}, {"logit_bias": ((0, 0.0),)}):
                # Over a mesh a program is compiled again for rows that lie otherwise: so it comes after every other.
                for count in (1, min(room, 2 * self.steps + 1)):
                    self.submit([0] * length, Sampling(stop_ids=(), **settings), count)
                self.run()

    def _let_in(self) -> list[tuple[list[Request | None], Emitted]]:
        """Read prompts, as far as this step's share goes, and begin those that are read: their first tokens."""
        first: list[tuple[list[Request | None], Emitted]] = []
        share = self.chunk
        while True:
            if self._reading is None and self._waiting and None in self._owners:
                self._reading = self._open(self._waiting.popleft())
            reading = self._reading
            if reading is None or share < min(reading.width, self.chunk):
                return first
            share -= reading.width
            if (logits := self._read(reading)) is not None:
                first.append(([reading.request], self._begin(reading, logits)))
                self._reading = None

    def _open(self, request: Request) -> Reading:
        width = self._width(len(request.prompt))
        tokens = width if self.config.stack != "encoder-decoder" else 1
        cache = _empty_cache(self.config, 1, tokens, self._cache_dtype, width)
        return Reading(request, cache, min(width, self.chunk) if tokens > 1 else width)

    def _read(self, reading: Reading) -> Float[Array, "one vocab"] | None:
        """One chunk of the prompt more; the logits after it once it is whole."""
        prompt, done = reading.request.prompt, reading.done
        part = prompt[done : done + reading.width]
        tokens, length = np.zeros((1, reading.width), np.int32), np.array([len(part)], np.int32)
        tokens[0, : len(part)] = part
        if self.config.stack == "encoder-decoder":
            source = {"encoder_tokens": tokens, "encoder_lengths": length}
            tokens, length = np.array([self._decoders(prompt)], np.int32), np.ones(1, np.int32)
        else:
            source = {}
        how = {"fresh": done == 0, "execution": self.execution}
        logits, reading.cache = prefill(self.config, self.params, tokens, length, reading.cache, **how, **source)
        reading.done += len(part)
        return logits if reading.done == len(prompt) else None

    def _begin(self, reading: Reading, logits: Float[Array, "one vocab"]) -> Emitted:
        """Choose a request's first token and put it into a free row."""
        request, slot = reading.request, self._owners.index(None)
        prompt, stops = self._decoders(request.prompt), self._stop_ids(request.sampling)
        tokens, stop_ids = np.zeros((1, self.capacity), np.int32), np.full((1, MOST_STOP_IDS), -1, np.int32)
        tokens[0, : len(prompt)], stop_ids[0, : len(stops)] = prompt, stops
        one = lambda value: np.array([value], np.int32)
        row = Rows(
            token=one(0),
            cache=KVCache(layers=(), lengths=one(0)),
            history=History(tokens, one(len(prompt)), one(len(prompt))),
            sampler=self._sampler(request.sampling),
            stop_ids=stop_ids,
            limits=one(request.max_new_tokens),
            status=one(RUNNING),
        )
        row, emitted = _choose_first(row, logits)
        self._rows = _put(self._rows, row, reading.cache, np.int32(slot))
        if request.max_new_tokens > 1:
            self._owners[slot], self._issued[slot] = request, 1
        return emitted

    def _decode(self) -> tuple[list[Request | None], Emitted] | None:
        """Send the device off for the next tokens. A row that will be full then is free already: whatever takes it
        comes later on the device."""
        owners = list(self._owners)
        left = [0 if one is None else one.max_new_tokens - self._issued[row] for row, one in enumerate(owners)]
        if not any(left):
            return None
        steps = min(self.steps, max(left))
        halt = np.array([one is None for one in owners])
        self._rows, emitted = decode(self.config, self.params, self._rows, np.int32(steps), halt)
        for row in range(self.slots):
            self._issued[row] += steps
            if left[row] <= steps:
                self._owners[row] = None
        return owners, emitted

    def _forget_ended(self) -> None:
        ended = lambda request: request is not None and request.finish_reason is not None
        self._owners = [None if ended(owner) else owner for owner in self._owners]
        if self._reading and ended(self._reading.request):
            self._reading = None
        self._waiting = deque(request for request in self._waiting if not ended(request))

    def _width(self, length: int) -> int:
        """Slots of the cache that a prompt is read into: of few sizes, as each is a program."""
        return min(bucket(length, SMALLEST_CHUNK), self.capacity)

    def _decoders(self, prompt: Prompt) -> Prompt:
        """The tokens before the output in the decoder."""
        return decoder_prompts(self.config, [prompt])[0]

    def _stop_ids(self, sampling: Sampling) -> Sequence[int]:
        return self.config.eos_token_ids if sampling.stop_ids is None else sampling.stop_ids


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: str | None, encoder_capacity: int) -> KVCache:
    return init_cache(config, batch, capacity, dtype, encoder_capacity)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_rows(config: ModelConfig, slots: int, capacity: int, dtype: str | None, key: PRNGKeyArray) -> Rows:
    """Rows that nobody has: greedy, because one row that samples costs all of them."""
    nobody = [GREEDY] * slots
    zeros = jnp.zeros(slots, jnp.int32)
    return Rows(
        token=zeros,
        cache=init_cache(config, slots, capacity, dtype, capacity),
        history=History(jnp.zeros((slots, capacity), jnp.int32), zeros, zeros),
        sampler=SamplerState.create(nobody, row_keys(nobody, key), config.vocab_size),
        stop_ids=jnp.full((slots, MOST_STOP_IDS), -1, jnp.int32),
        limits=zeros,
        status=zeros + STOPPED,
    )


@jax.jit
def _choose_first(row: Rows, logits: Float[Array, "one vocab"]) -> tuple[Rows, Emitted]:
    """As `begin`, but nothing is donated: requests share their settings' arrays."""
    return begin(row, logits)


@functools.partial(jax.jit, donate_argnums=0)
def _put(rows: Rows, row: Rows, cache: KVCache, slot: Int[Array, ""]) -> Rows:
    """One row with this cache in its slot, of whose cache it takes only what it needs.

    A ring shorter than the slot's has not wrapped around yet, so that its positions stand where they should.
    """
    row = row.replace(cache=cache.replace(capacity=rows.cache.capacity))  # type: ignore[attr-defined]
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (slot, *[np.int32(0)] * (old.ndim - 1)))
    return jax.tree.map(put, rows, row)

"""Continuous batching: requests arrive at any time, share one decode program, and leave when they are done."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from infer.completion import detokenizer
from infer.decode import ROOM, RUNNING, STOPPED, DecodeState, Emitted, begin, decode
from infer.prompts import SMALLEST_CHUNK, Prompt, bucket, check_generates, check_prompts, decoder_prompts
from infer.request import Request
from infer.sampling import GREEDY, History, SamplerState, Sampling, row_keys
from infer.step import prefill
from infer.text import Decoder
from model import Execution, KVCache, ModelConfig, Params, init_cache
from model.accounting import kv_cache_bytes
from model.ambient import lenient
from model.cache import CACHE_DTYPES
from model.dtypes import DTypeLike, dtype_name
from model.errors import InputError, check_at_least_one, check_whole
from model.sharding import under_mesh_of

MOST_STOP_IDS = 32  # per request, so that all requests share one program


@dataclasses.dataclass
class _Prefill:
    """A request whose prompt is being prefilled into a cache of its own, one chunk at a time."""

    request: Request
    cache: KVCache
    width: int  # tokens of a chunk
    done: int = 0  # tokens of the prompt in the cache


class _Launched(NamedTuple):
    """Tokens that the device is computing, and the request that each row belonged to at launch."""

    owners: list[Request | None]
    emitted: Emitted


class Engine:
    """A serving engine with continuous batching: each slot is a row of one cache and serves one request after another.

    A request's output equals `generate([prompt], sampling, key=key)`, independent of the other requests and of its
    arrival (iteration-level scheduling: Yu et al. 2022, Orca). Prompts are prefilled in the order of submission, into
    a cache of their own that is then copied into a free slot. A step prefills at most `chunk` tokens of prompts, which
    bounds how long running requests wait (chunked prefill: Agrawal et al. 2024, Sarathi-Serve). The host reads the
    tokens of one step while the device computes the next. Not thread-safe.
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
        """Allocate the cache.

        slots: most requests that run at the same time. capacity: most tokens of a request, prompt and output together,
        at most the context; for an encoder-decoder also the most tokens of the encoder's prompt. cache_dtype: see
        `init_cache`. cache_bytes: limit on the cache of the slots, which reduces their number; the prompt being
        prefilled needs up to one slot's bytes more. steps: tokens per running request in a step, at most ROOM. chunk:
        rounded up to a power of two; an int8 cache rounds earlier chunks before later ones read them, so that prompts
        longer than a chunk may continue differently than in `generate`. key, execution: see `generate`.
        Raises InputError if a number is below 1, steps exceed ROOM, or cache_bytes hold no slot.
        """
        check_generates(config)
        check_at_least_one(slots=slots, capacity=capacity, chunk=chunk)
        check_whole("steps", steps, 1, ROOM)
        if cache_dtype is not None:
            cache_dtype = dtype_name(cache_dtype, CACHE_DTYPES, "cache dtype")  # a static argument: one program
        self.config, self.params, self.execution = config, jax.tree.map(jnp.asarray, params), execution
        self.capacity = min(capacity, config.max_seq_len)
        if cache_bytes is not None:
            bytes_per_slot = kv_cache_bytes(config, 1, self.capacity, cache_dtype)
            slots = min(slots, cache_bytes // bytes_per_slot)
            if slots < 1:
                raise InputError(
                    f"cache_bytes={cache_bytes:,} does not hold one request of capacity={self.capacity}, "
                    f"which takes {bytes_per_slot:,} bytes; give more or a smaller capacity"
                )
        self.slots, self.steps, self.chunk = slots, steps, bucket(chunk, SMALLEST_CHUNK)
        self.tokenizer, self.clock, self._cache_dtype = tokenizer, clock, cache_dtype
        keys = row_keys([GREEDY], jax.random.key(0) if key is None else key)

        def sampler_of(sampling: Sampling) -> SamplerState:
            return SamplerState.create([sampling], keys, config.vocab_size)

        self._sampler = functools.lru_cache(8)(sampler_of)
        with under_mesh_of(self.params):
            self._state = _empty_state(config, slots, self.capacity, cache_dtype, keys[0])
        self._waiting: deque[Request] = deque()
        self._prefill: _Prefill | None = None
        self._owners: list[Request | None] = [None] * slots  # None: free for the next request
        self._launched_tokens = [0] * slots  # output tokens of the slot's owner, those being computed included
        self._in_flight: _Launched | None = None
        self._cancelled: list[Request] = []

    def submit(self, prompt: Prompt, sampling: Sampling = Sampling(), max_new_tokens: int = 64) -> Request:
        """Queue a prompt; for an encoder-decoder the encoder's.

        Raises InputError at once if the request can never be served: if `generate` would raise, on more tokens than
        the capacity, n > 1, or more than MOST_STOP_IDS stop ids.
        """
        prompt = list(prompt)
        check_prompts(self.config, [prompt], max_new_tokens)
        if max(len(prompt), len(self._decoder_prompt(prompt)) + max_new_tokens) > self.capacity:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit the engine's "
                f"capacity={self.capacity}"
            )
        if sampling.n > 1:
            raise InputError(f"n={sampling.n} in one request; submit it {sampling.n} times, each with its own seed")
        if sampling.stop_strings and self.tokenizer is None:
            raise InputError(f"stop_strings={sampling.stop_strings!r} need a tokenizer; give Engine(…, tokenizer=…)")
        if len(self._stop_ids(sampling)) > MOST_STOP_IDS:
            raise InputError(f"{len(self._stop_ids(sampling))} stop ids in one request; give at most {MOST_STOP_IDS}")
        if sampling.logit_bias:
            self._sampler(sampling)  # raises for ids outside the vocabulary
        words = detokenizer(self.tokenizer, self._decoder_prompt(prompt), sampling)
        request = Request(sampling, words, prompt=prompt, max_new_tokens=max_new_tokens, submitted=self.clock())
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; its slot is free from the next step on. A request that has ended stays unchanged."""
        if request.finish_reason is None:
            request.end("cancelled")
            request.finished = self.clock()
            self._cancelled.append(request)

    @property
    def idle(self) -> bool:
        """True if no request waits or runs, and all tokens and cancellations have been returned by `step`."""
        return not (self._waiting or self._prefill or any(self._owners) or self._in_flight or self._cancelled)

    def run(self) -> None:
        """Step until all requests have ended."""
        while not self.idle:
            self.step()

    @lenient()
    def step(self) -> list[Request]:
        """Admit requests, launch up to `steps` tokens of every running one, and read the tokens of the last step.

        Returns the requests that got tokens or ended since the last step. Does nothing if the engine is idle.
        """
        changed, self._cancelled = self._cancelled, []
        self._release_ended()
        with under_mesh_of(self.params):
            first_tokens = self._admit()
            launched = self._launch_decode()
        ready = first_tokens if self._in_flight is None else [self._in_flight, *first_tokens]
        for owners, on_device in ready:
            emitted = jax.device_get(on_device)  # waits for the device, which then works on `launched`
            now = self.clock()
            for row, request in enumerate(owners):
                if request is not None and request.receive(emitted, row, now):
                    changed.append(request)
        self._in_flight = launched
        self._release_ended()
        return list(dict.fromkeys(changed))

    def warm_up(self, prompt_lengths: Sequence[int] | None = None) -> None:
        """Compile all programs for prompts of these lengths (None: of any length), with any settings.

        Lengths with the same next power of two share programs. Over a mesh, a program may still be compiled later.
        Raises InputError unless the engine is idle.
        """
        if not self.idle:
            raise InputError("warm_up needs an idle engine; call it before the first request")
        longest = self.capacity - (self.config.stack != "encoder-decoder")
        if prompt_lengths is None:
            prompt_lengths = [1 << power for power in range(longest.bit_length())] + [longest]
        length_of_width = {self._prompt_width(length): min(length, longest) for length in (1, *prompt_lengths)}
        for length in length_of_width.values():
            room = self.capacity - len(self._decoder_prompt([0] * length))
            for settings in ({}, {"seed": 0}, {"logit_bias": ((0, 0.0),)}):
                # Over a mesh a program is compiled again for inputs of another sharding, which depends on the program
                # that ran before: each one has to run after every other.
                for count in (1, min(room, 2 * self.steps + 1)):
                    self.submit([0] * length, Sampling(stop_ids=(), **settings), count)
                self.run()

    def _admit(self) -> list[_Launched]:
        """Prefill up to `chunk` tokens of waiting prompts; put complete ones into free slots with their first token."""
        first_tokens: list[_Launched] = []
        budget = self.chunk
        while True:
            if self._prefill is None and self._waiting and None in self._owners:
                self._prefill = self._start_prefill(self._waiting.popleft())
            current = self._prefill
            if current is None or budget < min(current.width, self.chunk):
                return first_tokens
            budget -= current.width
            logits = self._prefill_chunk(current)
            if logits is not None:
                first_tokens.append(_Launched([current.request], self._fill_slot(current, logits)))
                self._prefill = None

    def _start_prefill(self, request: Request) -> _Prefill:
        width = self._prompt_width(len(request.prompt))
        if self.config.stack == "encoder-decoder":  # the decoder starts from one token, the encoder reads all at once
            capacity, chunk = 1, width
        else:
            capacity, chunk = width, min(width, self.chunk)
        cache = _empty_cache(self.config, 1, capacity, self._cache_dtype, width)
        return _Prefill(request, cache, chunk)

    def _prefill_chunk(self, current: _Prefill) -> Float[Array, "1 vocab"] | None:
        """Prefill one more chunk; return the logits after the prompt if it was the last chunk."""
        prompt, done = current.request.prompt, current.done
        part = prompt[done : done + current.width]
        tokens, length = np.zeros((1, current.width), np.int32), np.array([len(part)], np.int32)
        tokens[0, : len(part)] = part
        source: dict[str, np.ndarray] = {}
        if self.config.stack == "encoder-decoder":
            source = {"encoder_tokens": tokens, "encoder_lengths": length}
            tokens, length = np.array([self._decoder_prompt(prompt)], np.int32), np.ones(1, np.int32)
        options = {"fresh": done == 0, "execution": self.execution}
        logits, current.cache = prefill(self.config, self.params, tokens, length, current.cache, **options, **source)
        current.done += len(part)
        return logits if current.done == len(prompt) else None

    def _fill_slot(self, current: _Prefill, logits: Float[Array, "1 vocab"]) -> Emitted:
        """Choose the first token of a request and put its row into a free slot."""
        request, slot = current.request, self._owners.index(None)
        prompt, stops = self._decoder_prompt(request.prompt), self._stop_ids(request.sampling)
        tokens, stop_ids = np.zeros((1, self.capacity), np.int32), np.full((1, MOST_STOP_IDS), -1, np.int32)
        tokens[0, : len(prompt)], stop_ids[0, : len(stops)] = prompt, stops

        def one_row(value: int) -> np.ndarray:
            return np.array([value], np.int32)

        row = DecodeState(
            token=one_row(0),
            cache=KVCache(layers=(), lengths=one_row(0)),
            history=History(tokens, one_row(len(prompt)), one_row(len(prompt))),
            sampler=self._sampler(request.sampling),
            stop_ids=stop_ids,
            limits=one_row(request.max_new_tokens),
            status=one_row(RUNNING),
        )
        row, emitted = _choose_first(row, logits)
        self._state = _insert(self._state, row, current.cache, np.int32(slot))
        if request.max_new_tokens > 1:
            self._owners[slot], self._launched_tokens[slot] = request, 1
        return emitted

    def _launch_decode(self) -> _Launched | None:
        """Dispatch the next tokens of all running requests; return None if there are none.

        A request that will be at its limit after them frees its slot now, before it is read: the next request's row is
        inserted by a later program, and the device runs programs in order.
        """
        owners = list(self._owners)
        left = [
            0 if owner is None else owner.max_new_tokens - launched
            for owner, launched in zip(owners, self._launched_tokens, strict=True)
        ]
        if not any(left):
            return None
        steps = min(self.steps, max(left))
        halt = np.array([owner is None for owner in owners])
        self._state, emitted = decode(self.config, self.params, self._state, np.int32(steps), halt)
        for slot in range(self.slots):
            self._launched_tokens[slot] += steps
            if left[slot] <= steps:
                self._owners[slot] = None
        return _Launched(owners, emitted)

    def _release_ended(self) -> None:
        """Forget requests that have ended: in slots, in the prefill, and in the queue."""

        def ended(request: Request | None) -> bool:
            return request is not None and request.finish_reason is not None

        self._owners = [None if ended(owner) else owner for owner in self._owners]
        if self._prefill and ended(self._prefill.request):
            self._prefill = None
        self._waiting = deque(request for request in self._waiting if not ended(request))

    def _prompt_width(self, length: int) -> int:
        """Return the capacity of the cache that a prompt is prefilled into: one of few, since each is a program."""
        return min(bucket(length, SMALLEST_CHUNK), self.capacity)

    def _decoder_prompt(self, prompt: Prompt) -> Prompt:
        return decoder_prompts(self.config, [prompt])[0]

    def _stop_ids(self, sampling: Sampling) -> Sequence[int]:
        return self.config.eos_token_ids if sampling.stop_ids is None else sampling.stop_ids


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: str | None, encoder_capacity: int) -> KVCache:
    return init_cache(config, batch, capacity, dtype, encoder_capacity)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_state(config: ModelConfig, slots: int, capacity: int, dtype: str | None, key: PRNGKeyArray) -> DecodeState:
    """Return stopped rows. They are greedy: one row that samples would make all rows pay for sampling."""
    samplings = [GREEDY] * slots
    zeros = jnp.zeros(slots, jnp.int32)
    return DecodeState(
        token=zeros,
        cache=init_cache(config, slots, capacity, dtype, capacity),
        history=History(jnp.zeros((slots, capacity), jnp.int32), zeros, zeros),
        sampler=SamplerState.create(samplings, row_keys(samplings, key), config.vocab_size),
        stop_ids=jnp.full((slots, MOST_STOP_IDS), -1, jnp.int32),
        limits=zeros,
        status=zeros + STOPPED,
    )


@jax.jit
def _choose_first(row: DecodeState, logits: Float[Array, "1 vocab"]) -> tuple[DecodeState, Emitted]:
    """Call `begin` without donation: requests with equal settings share the arrays of their sampler."""
    return begin(row, logits)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: DecodeState, row: DecodeState, cache: KVCache, slot: Int[Array, ""]) -> DecodeState:
    """Write one row and its cache into a slot.

    The row's cache may be shorter than the slot's. The ring of a sliding-window layer may be shorter too: it has not
    wrapped around yet, so position p is in entry p of both.
    """
    row = row.replace(cache=cache.replace(capacity=state.cache.capacity))  # type: ignore[attr-defined]

    def write(slots: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(slots, new, (slot, *[np.int32(0)] * (slots.ndim - 1)))

    return jax.tree.map(write, state, row)

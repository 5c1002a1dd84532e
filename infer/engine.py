"""Continuous batching: requests arrive at any time, share one decode program, and leave when they are done."""

import dataclasses
import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from infer.completion import detokenizer
from infer.constraint import Constraint, words_of
from infer.decode import ROOM, RUNNING, DecodeState, Emitted, decode
from infer.prefix_cache import NO_PREFIX, Prefix, PrefixCache
from infer.prompts import SMALLEST_CHUNK, Prompt, bucket, check_generates, check_prompts, decoder_prompts
from infer.request import Request
from infer.sampling import GREEDY, History, SamplerState, Sampling, check_bias, row_keys
from infer.slots import MOST_STOP_IDS, choose_first, empty_cache, empty_state, insert
from infer.step import prefill
from infer.text import Decoder
from model import Execution, KVCache, ModelConfig, Params
from model.accounting import kv_cache_bytes
from model.ambient import lenient
from model.cache import CACHE_DTYPES
from model.dtypes import DTypeLike, dtype_name
from model.errors import InputError, check_at_least_one, check_whole
from model.sharding import under_mesh_of


class Totals(NamedTuple):
    """Counts of an engine since it started or warmed up.

    prompt_tokens: of all requests that left the queue. generated_tokens: those dropped with a stop string included.
    finished: requests by finish reason. prefix_queries: tokens of prompts that were looked up in the prefix cache.
    prefix_hits: tokens of prompts that did not have to be read.
    """

    prompt_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]
    prefix_queries: int
    prefix_hits: int


@dataclasses.dataclass
class _Prefill:
    """A request whose prompt is being prefilled. prefix: what the engine's cache of one row holds of it.

    logits: after the prompt; None until it is whole.
    """

    request: Request
    prefix: Prefix = NO_PREFIX
    logits: Float[Array, "1 vocab"] | None = None


class _Launched(NamedTuple):
    """Tokens that the device is computing, and the request that each row belonged to at launch."""

    owners: list[Request | None]
    emitted: Emitted


class Engine:
    """A serving engine with continuous batching: each slot is a row of one cache and serves one request after another.

    Requests join and leave between steps (iteration-level scheduling: Yu et al. 2022, Orca). Prompts are prefilled in
    the order of submission, in a cache of one row that is then copied into a free slot. A step prefills at most
    `chunk` tokens of prompts, which bounds how long running requests wait (chunked prefill: Agrawal et al. 2024,
    Sarathi-Serve), and one token of each running request if further prompts wait for free slots: a step takes as long
    with an empty slot as with a full one. The host reads the tokens of one step while the device computes the next. Not
    thread-safe: see `infer.service`.

    A request's output is that of `generate([prompt], sampling, key=key)` up to rounding. In float32 on a CPU it is the
    same to the last bit whatever else is served, in any slot, before and after a restart: one program of one shape,
    with all settings in it, decodes all rows, and prompts are read in blocks of `block` tokens, whose arithmetic
    depends only on the tokens before them. Blocks are kept for later prompts that begin with them (`PrefixCache`), and
    consecutive requests with equal prompts share one prefill. The draws of a request without a seed depend on `key`
    alone, so that two equal ones give the same text; give each its own seed.
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
        prefix_bytes: int | None = None,
        steps: int = 8,
        block: int = 64,
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
        prefilled takes one slot's bytes more. prefix_bytes: limit on the prefix cache; 0 switches it off, None: a
        quarter of the slots' cache, and at least one slot's. steps: tokens per running request in a step, at most
        ROOM. block, chunk: rounded up to powers of two; a block is at most a chunk. An int8 cache rounds earlier blocks
        before later ones read them, so that prompts longer than a block may continue differently than in `generate`.
        key, execution: see `generate`.
        Raises InputError if a number is below 1, steps exceed ROOM, or cache_bytes hold no slot.
        """
        check_generates(config)
        check_at_least_one(slots=slots, capacity=capacity, block=block, chunk=chunk)
        check_whole("steps", steps, 1, ROOM)
        if prefix_bytes is not None:
            check_whole("prefix_bytes", prefix_bytes, hint="0 keeps no prefixes")
        if cache_dtype is not None:
            cache_dtype = dtype_name(cache_dtype, CACHE_DTYPES, "cache dtype")  # a static argument: one program
        self.config, self.params, self.execution = config, jax.tree.map(jnp.asarray, params), execution
        self.capacity = min(capacity, config.max_seq_len)
        bytes_per_slot = kv_cache_bytes(config, 1, self.capacity, cache_dtype)
        if cache_bytes is not None:
            slots = min(slots, cache_bytes // bytes_per_slot)
            if slots < 1:
                raise InputError(
                    f"cache_bytes={cache_bytes:,} does not hold one request of capacity={self.capacity}, "
                    f"which takes {bytes_per_slot:,} bytes; give more or a smaller capacity"
                )
        self.slots, self.steps, self.chunk = slots, steps, bucket(chunk, SMALLEST_CHUNK)
        self.block = min(bucket(block, SMALLEST_CHUNK), self.chunk)
        self.tokenizer, self.clock = tokenizer, clock
        keys = row_keys([GREEDY], jax.random.key(0) if key is None else key)

        def sampler_of(sampling: Sampling) -> SamplerState:
            return SamplerState.create([sampling], keys, config.vocab_size, self._stop_row(sampling))

        self._sampler = functools.lru_cache(8)(sampler_of)
        with under_mesh_of(self.params):
            self._state = empty_state(config, slots, self.capacity, cache_dtype, keys[0])
            self._cache = empty_cache(config, self.capacity, cache_dtype)  # of the prompt that is prefilled
            limit = _prefix_bytes(slots, bytes_per_slot) if prefix_bytes is None else prefix_bytes
            self._prefixes = PrefixCache(config, self.block, limit, cache_dtype)
        self._waiting: deque[Request] = deque()
        self._prefill: _Prefill | None = None
        self._last_prefill: _Prefill | None = None  # the one whose prompt is whole in the cache of one row
        self._owners: list[Request | None] = [None] * slots  # None: free for the next request
        self._launched_tokens = [0] * slots  # output tokens of the slot's owner, those being computed included
        self._in_flight: _Launched | None = None
        self._ended: list[Request] = []  # without a token of the device; not returned by `step` yet
        self._totals = Totals(0, 0, {}, 0, 0)

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 64,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queue a prompt; for an encoder-decoder the encoder's. Raises InputError as `make_request` does."""
        request = self.make_request(prompt, sampling, max_new_tokens, constraint)
        self.enqueue(request)
        return request

    def make_request(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 64,
        constraint: Constraint | None = None,
    ) -> Request:
        """Return a request for `enqueue`. Reads no state of the engine, so that any thread may call it.

        constraint: limits the tokens, see `infer.constraint`. Its masks are computed on the host, token by token: while
        a constrained request runs, every step is one token for all running requests, and the device waits between them.
        `Sampling.min_tokens` has no effect beside it.
        Raises InputError if the request can never be served: if `generate` would raise, on more tokens than the
        capacity, n > 1, or more than MOST_STOP_IDS stop ids.
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
        check_bias(sampling, self.config.vocab_size)
        words = detokenizer(self.tokenizer, self._decoder_prompt(prompt), sampling)
        return Request(
            sampling,
            words,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            submitted=self.clock(),
            constraint=constraint,
        )

    def enqueue(self, request: Request) -> None:
        """Queue a request that `make_request` returned."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now; its slot is free from the next step on. A request that has ended stays unchanged."""
        if request.finish_reason is None:
            request.end("cancelled")
            self._ended_on_host(request)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request now with the finish reason "error"; as `cancel` otherwise."""
        if request.finish_reason is None:
            request.fail(error)
            self._ended_on_host(request)

    @property
    def idle(self) -> bool:
        """True if no request waits or runs, and all tokens and ended requests have been returned by `step`."""
        return not (self._waiting or self._prefill or any(self._owners) or self._in_flight or self._ended)

    @property
    def running(self) -> list[Request]:
        """The requests in slots that have not ended."""
        return [owner for owner in self._owners if owner is not None and owner.finish_reason is None]

    @property
    def spare_slots(self) -> int:
        """Slots that no waiting request takes at the next step while the device computes one; 0 if it computes none."""
        if self._in_flight is None:
            return 0
        return self._owners.count(None) - len(self._waiting) - (self._prefill is not None)

    @property
    def totals(self) -> Totals:
        """What the engine has done; any thread may read it."""
        return self._totals

    def run(self) -> None:
        """Step until all requests have ended."""
        while not self.idle:
            self.step()

    @lenient()
    def step(self) -> list[Request]:
        """Admit requests, launch up to `steps` tokens of every running one, and read the tokens of the last step.

        Returns the requests that got tokens or ended since the last step. Does nothing if the engine is idle.
        With a constrained request among the running ones, the tokens of the last step are read before one more is
        launched.
        """
        changed: list[Request] = []
        self._release_ended()
        with under_mesh_of(self.params):
            first_tokens = self._admit()
            unread = first_tokens if self._in_flight is None else [self._in_flight, *first_tokens]
            self._in_flight = None
            if any(request.constraint is not None for request in self.running):
                changed, unread = self._read(unread), []
                self._release_ended()
            launched = self._launch_decode()
        changed += self._read(unread)  # waits for the device, which then works on `launched`
        self._in_flight = launched
        self._release_ended()
        changed, self._ended = [*self._ended, *changed], []
        changed = list(dict.fromkeys(changed))
        finished = Counter(request.finish_reason for request in changed if request.finish_reason is not None)
        self._totals = self._totals._replace(finished=finished + Counter(self._totals.finished))
        return changed

    def warm_up(self, prompt_lengths: Sequence[int] | None = None) -> None:
        """Compile all programs for prompts of these lengths (None: of any length), with any settings.

        Empties the prefix cache. Over a mesh, a program may still be compiled later.
        Raises InputError unless the engine is idle.
        """
        if not self.idle:
            raise InputError("warm_up needs an idle engine; call it before the first request")
        longest = self.capacity - (self.config.stack != "encoder-decoder")
        if prompt_lengths is None:
            powers = [1 << power for power in range(self.capacity.bit_length())]
            prompt_lengths = [*powers, *(self.block + power for power in powers), longest]
        # One length for each last block that is a program of its own, with and without a block before it.
        lengths = {}
        for length in (1, *prompt_lengths):
            length = min(length, longest)
            width = self._width(length, self._last_start(length))
            lengths[length > self.block, length > 2 * self.block, width] = length
        for number, length in enumerate(lengths.values()):
            room = self.capacity - len(self._decoder_prompt([0] * length))
            for settings in ({}, {"seed": 0}, {"logit_bias": ((0, 0.0),)}) if number == 0 else ({},):
                # Over a mesh a program is compiled again for inputs of another sharding, which depends on the program
                # that ran before: each one has to run after every other.
                for count in (1, min(room, 2 * self.steps + 1)):
                    for last_token in (0, 1):  # the second one finds the first one's blocks
                        prompt = [0] * (length - 1) + [last_token]
                        self.submit(prompt, Sampling(stop_ids=(), **settings), count)
                    self.run()
                    self._prefixes.clear()
                    self._last_prefill = None
        self._totals = Totals(0, 0, {}, 0, 0)

    def _read(self, unread: list[_Launched]) -> list[Request]:
        """Wait for the tokens, and return the requests that got some or ended."""
        changed, tokens = [], 0
        for owners, on_device in unread:
            emitted = jax.device_get(on_device)
            now = self.clock()
            for row, request in enumerate(owners):
                if request is not None and request.receive(emitted, row, now):
                    changed.append(request)
                    tokens += int(np.count_nonzero(emitted.tokens[row] >= 0))
        self._totals = self._totals._replace(generated_tokens=self._totals.generated_tokens + tokens)
        return changed

    def _admit(self) -> list[_Launched]:
        """Prefill up to `chunk` tokens of waiting prompts; put complete ones into free slots with their first token."""
        first_tokens: list[_Launched] = []
        budget = self.chunk
        while True:
            if self._prefill is None and self._waiting and None in self._owners:
                self._prefill = self._start_prefill(self._waiting.popleft())
            current = self._prefill
            if current is None:
                return first_tokens
            if current.logits is None:
                width = self._width(len(current.request.prompt), current.prefix.length)
                if budget < min(width, self.chunk):
                    return first_tokens
                budget -= width
                self._prefill_block(current)
            if current.logits is not None:
                self._last_prefill, self._prefill = current, None
                emitted = self._fill_slot(current.request, current.logits)
                if emitted is not None:
                    first_tokens.append(_Launched([current.request], emitted))

    def _start_prefill(self, request: Request) -> _Prefill:
        """Take what is known of the prompt: all of it from the last prefill, or its beginning from the prefix cache."""
        request.started = self.clock()
        last, length = self._last_prefill, len(request.prompt)
        totals = self._totals._replace(prompt_tokens=self._totals.prompt_tokens + length)
        if self._prefixes.rows:
            totals = totals._replace(prefix_queries=totals.prefix_queries + length)
        if last is not None and last.request.prompt == request.prompt:
            started = _Prefill(request, last.prefix, last.logits)
            request.prefix_hits = length
        else:
            self._last_prefill = None
            started = _Prefill(request, self._prefixes.find(request.prompt))
            request.prefix_hits = started.prefix.length
            if started.prefix.rows:
                self._cache = self._prefixes.restore(self._cache, started.prefix)
        self._totals = totals._replace(prefix_hits=totals.prefix_hits + request.prefix_hits)
        return started

    def _prefill_block(self, current: _Prefill) -> None:
        """Prefill one more block, and store it if it is whole."""
        prompt, start = current.request.prompt, current.prefix.length
        width = self._width(len(prompt), start)
        part = prompt[start : start + width]
        tokens, length = np.zeros((1, width), np.int32), np.array([len(part)], np.int32)
        tokens[0, : len(part)] = part
        source: dict[str, np.ndarray] = {}
        if self.config.stack == "encoder-decoder":
            source = {"encoder_tokens": tokens, "encoder_lengths": length}
            tokens, length = np.array([self._decoder_prompt(prompt)], np.int32), np.ones(1, np.int32)
        cache = self._cache.replace(lengths=np.array([start], np.int32))
        options = {"fresh": start == 0, "execution": self.execution}
        logits, self._cache = prefill(self.config, self.params, tokens, length, cache, **options, **source)
        if len(part) == self.block:
            current.prefix = self._prefixes.add(self._cache, current.prefix, part)
        else:
            current.prefix = Prefix(start + len(part), None, [])
        if current.prefix.length == len(prompt):
            current.logits = logits

    def _fill_slot(self, request: Request, logits: Float[Array, "1 vocab"]) -> Emitted | None:
        """Choose the first token of a request and put its row into a free slot; None: its constraint ended it."""
        slot, prompt = self._owners.index(None), self._decoder_prompt(request.prompt)
        masks, constrained = self._masks([request])
        if request.finish_reason is not None:
            return None
        tokens = np.zeros((1, self.capacity), np.int32)
        tokens[0, : len(prompt)] = prompt
        sampling = request.sampling
        if request.constraint is not None:  # which alone decides where the output may end
            sampling = dataclasses.replace(sampling, min_tokens=0)

        def one_row(value: int) -> np.ndarray:
            return np.array([value], np.int32)

        sources = one_row(len(request.prompt)) if self.config.stack == "encoder-decoder" else None
        row = DecodeState(
            token=one_row(0),
            cache=KVCache((), one_row(len(prompt)), sources, self.capacity),
            history=History(tokens, one_row(len(prompt)), one_row(len(prompt))),
            sampler=self._sampler(sampling),
            stop_ids=self._stop_row(request.sampling),
            limits=one_row(request.max_new_tokens),
            status=one_row(RUNNING),
        )
        row, emitted = choose_first(row, logits, masks, constrained)
        blocks = np.int32(-(-len(request.prompt) // self.block))
        self._state = insert(self.block, self._state, row, self._cache, np.int32(slot), blocks)
        if request.max_new_tokens > 1:
            self._owners[slot], self._launched_tokens[slot] = request, 1
        return emitted

    def _launch_decode(self) -> _Launched | None:
        """Dispatch the next tokens of all running requests; return None if there are none.

        A request that will be at its limit after them frees its slot now, before it is read: the next request's row is
        inserted by a later program, and the device runs programs in order.
        """
        masks, constrained = self._masks(self._owners)
        self._release_ended()
        owners = list(self._owners)
        left = [
            0 if owner is None else owner.max_new_tokens - launched
            for owner, launched in zip(owners, self._launched_tokens, strict=True)
        ]
        if not any(left):
            return None
        filling = bool(self._waiting) and owners.count(None) > (self._prefill is not None)
        steps = 1 if filling or constrained.any() else min(self.steps, max(left))
        halt = np.array([owner is None for owner in owners])
        self._state, emitted = decode(self.config, self.params, self._state, np.int32(steps), halt, masks, constrained)
        for slot in range(self.slots):
            self._launched_tokens[slot] += steps
            if left[slot] <= steps:
                self._owners[slot] = None
        return _Launched(owners, emitted)

    def _masks(self, owners: Sequence[Request | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return the masks of these rows, uint32 [rows, words], and which of them are constrained."""
        masks = np.zeros((len(owners), words_of(self.config.vocab_size)), np.uint32)
        constrained = np.zeros(len(owners), bool)
        for row, request in enumerate(owners):
            if request is None or request.constraint is None:
                continue
            mask = request.next_mask(self.config.vocab_size)
            if mask is None:
                self._ended_on_host(request)
            else:
                masks[row], constrained[row] = mask, True
        return masks, constrained

    def _ended_on_host(self, request: Request) -> None:
        request.finished = self.clock()
        self._ended.append(request)

    def _release_ended(self) -> None:
        """Forget requests that have ended: in slots, in the prefill, and in the queue."""

        def ended(request: Request | None) -> bool:
            return request is not None and request.finish_reason is not None

        self._owners = [None if ended(owner) else owner for owner in self._owners]
        if self._prefill and ended(self._prefill.request):
            self._prefill = None
        if any(map(ended, self._waiting)):
            self._waiting = deque(request for request in self._waiting if not ended(request))

    def _width(self, length: int, start: int) -> int:
        """Return the padded width of the block of a prompt that starts here: few widths, since each is a program."""
        if self.config.stack == "encoder-decoder":  # the encoder reads all at once
            return min(bucket(length, SMALLEST_CHUNK), self.capacity)
        return min(bucket(length - start, SMALLEST_CHUNK), self.block)

    def _last_start(self, length: int) -> int:
        return (length - 1) // self.block * self.block

    def _stop_row(self, sampling: Sampling) -> Int[np.ndarray, "1 stops"]:
        """Return the stop ids, padded with −1."""
        stops = self._stop_ids(sampling)
        row = np.full((1, MOST_STOP_IDS), -1, np.int32)
        row[0, : len(stops)] = stops
        return row

    def _decoder_prompt(self, prompt: Prompt) -> Prompt:
        return decoder_prompts(self.config, [prompt])[0]

    def _stop_ids(self, sampling: Sampling) -> Sequence[int]:
        return self.config.eos_token_ids if sampling.stop_ids is None else sampling.stop_ids


def caches_bytes(config: ModelConfig, slots: int, capacity: int, cache_dtype: DTypeLike | None = None) -> int:
    """Return the bytes of all caches of an `Engine`: of its slots, of the prompt being prefilled, and of prefixes."""
    bytes_per_slot = kv_cache_bytes(config, 1, min(capacity, config.max_seq_len), cache_dtype)
    return (slots + 1) * bytes_per_slot + _prefix_bytes(slots, bytes_per_slot)


def _prefix_bytes(slots: int, bytes_per_slot: int) -> int:
    return max(slots * bytes_per_slot // 4, bytes_per_slot)

"""Texts to embed and prompts to score: read in a thread of their own, block by block between the engine's steps."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from infer.reader import Reader, Run, Score, directly
from infer.serve.limits import ACCOUNT, spend
from infer.service import QueueFull, Service
from model import ModelConfig, Params

Result = TypeVar("Result")
_MOST_WAITING = 64  # requests
_RETRY_SECONDS = 1.0


class Reading:
    """Reads texts of one model, one at a time; requests with several texts take turns.

    The engine goes on decoding between two blocks of a text. For the event loop; the methods are cancelled within a
    block. They raise InputError for a text that cannot be read, and QueueFull if too many requests wait.
    """

    def __init__(self, config: ModelConfig, params: Params, capacity: int, service: Service | None):
        self._service = service
        self._reader = Reader(config, params, capacity)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._requests = 0
        self._most = _MOST_WAITING if service is None else service.engine.slots + service.most_waiting

    async def embeddings(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return `Reader.embedding` of each text, float32 [d_model]."""
        return await self._each(self._reader.embedding, texts)

    async def logprobs(self, texts: Sequence[Sequence[int]], count: int) -> list[list[Score | None]]:
        """Return `Reader.logprobs` of each text."""
        return await self._each(lambda ids, run: self._reader.logprobs(ids, count, run), texts)

    def close(self) -> None:
        """End the thread; texts that wait are not read."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _each(self, read: Callable[[Sequence[int], Run], Result], texts: Sequence[Sequence[int]]) -> list[Result]:
        if self._requests >= self._most:
            raise QueueFull(self._requests, _RETRY_SECONDS)
        left = threading.Event()
        spend(ACCOUNT.get(), sum(map(len, texts)))

        def run(block: Callable[[], Any]) -> Any:
            if left.is_set():
                raise CancelledError
            return directly(block) if self._service is None else self._service.call(block).result()

        self._requests += 1
        try:
            return [await asyncio.wrap_future(self._thread.submit(read, ids, run)) for ids in texts]
        finally:
            self._requests -= 1
            left.set()

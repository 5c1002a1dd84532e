"""An engine in a thread of its own: any thread submits requests and cancels them, listeners hear of their output."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from infer.completion import Update
from infer.engine import Engine
from infer.prompts import Prompt
from infer.request import Request
from infer.sampling import Sampling

Result = TypeVar("Result")
Listener = Callable[[Request, Update], None]


class QueueFull(Exception):
    """The queue of waiting requests is full. retry_after: seconds after which there is probably room."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Load(NamedTuple):
    """What a service does at present. cache_share: share of the slots' tokens that hold some request's tokens."""

    running: int
    waiting: int
    cache_share: float
    prefix_queries: int  # tokens of prompts, since the start
    prefix_hits: int  # of these, tokens that were in the prefix cache


class Service:
    """A thread that steps an engine while there is work. All methods may be called from any thread.

    Use it as a context manager, or call `start` and `close`. A failure of the engine ends all requests with the
    finish reason "error", and is raised by the next `submit`.
    """

    def __init__(self, engine: Engine, *, most_waiting: int = 64):
        self.engine, self.most_waiting = engine, most_waiting
        self._work = threading.Condition()
        self._listeners: dict[Request, Listener] = {}
        self._jobs: deque[tuple[Callable[[], object], Future]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> "Service":
        """Start the thread."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        with self._work:
            for request in list(self._listeners):
                self.engine.cancel(request)
            self._closing = True
            self._work.notify()
        self._thread.join()

    def __enter__(self) -> "Service":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, prompt: Prompt, sampling: Sampling, max_new_tokens: int, listener: Listener) -> Request:
        """Queue a prompt. The listener is called in the engine's thread, for each step that gave the request output.

        Its last call has the finish reason. It must return at once. Raises InputError if the request can never be
        served, QueueFull if too many wait.
        """
        with self._work:
            if len(self.engine._waiting) >= self.most_waiting:
                raise QueueFull(len(self.engine._waiting), retry_after=1.0)
            request = self.engine.submit(prompt, sampling, max_new_tokens)
            self._listeners[request] = listener
            self._work.notify()
        return request

    def cancel(self, request: Request) -> None:
        """End a request with the finish reason "cancelled"; its slot is free from the next step on."""
        with self._work:
            self.engine.cancel(request)
            self._work.notify()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function in the engine's thread, between two steps: the device computes one thing at a time."""
        future: Future[Result] = Future()
        with self._work:
            self._jobs.append((function, future))
            self._work.notify()
        return future

    def load(self) -> Load:
        """Return the present load."""
        with self._work:
            engine = self.engine
            running = [owner for owner in engine._owners if owner is not None]
            held = sum(len(owner.prompt) + len(owner.tokens) for owner in running)
            return Load(len(running), len(engine._waiting), held / (engine.slots * engine.capacity), 0, 0)

    def _loop(self) -> None:
        while True:
            with self._work:
                while self.engine.idle and not self._jobs and not self._closing:
                    self._work.wait()
                if self._closing and self.engine.idle:
                    return
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                function, future = job
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            with self._work:
                changed = [] if self.engine.idle else self.engine.step()
            for request in changed:
                update = request.take()
                listener = self._listeners[request]
                if update.finish_reason is not None:
                    del self._listeners[request]
                listener(request, update)

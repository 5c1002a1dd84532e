"""An engine in a thread of its own: any thread submits requests and cancels them, listeners hear of their output."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from infer.completion import Update
from infer.constraint import Constraint
from infer.engine import Engine, Totals
from infer.prompts import Prompt
from infer.request import Request
from infer.sampling import Sampling
from model.errors import InputError, check_whole

Result = TypeVar("Result")
Listener = Callable[[Request, Update], None]
LOG = logging.getLogger(__name__)
_RECENT_STEPS = 4  # the shortest of which is expected again: others read prompts
_RECENT = 32  # finished requests from which the time of the next one is estimated
_SHORTEST_RETRY, _LONGEST_RETRY, _UNKNOWN_RETRY = 0.1, 60.0, 1.0  # seconds
_LAUNCH_AT = 0.5  # of the time of a step, after which the next one is launched although slots are free


class QueueFull(Exception):
    """The queue of waiting requests is full. retry_after: seconds after which there is probably room."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class ServiceStopped(Exception):
    """The service takes no requests: it was closed or not started, or the engine failed, which is then the cause."""


class Load(NamedTuple):
    """The present load of a service.

    running: requests that have left the queue. waiting: all others that have not ended. cache_share: share of the
    slots' tokens that hold some request's tokens. failure: what ended the engine; None: nothing. For the others see
    `Totals`.
    """

    running: int
    waiting: int
    cache_share: float
    prefix_queries: int
    prefix_hits: int
    failure: str | None = None


class Service:
    """A thread that steps an engine while there is work. Any thread may call all methods; they return at once.

    Use it as a context manager, or call `start` and `close`. Only the thread touches the engine: requests,
    cancellations and jobs are handed over between two steps. A request is cancelled before the next step, whether it
    waits, is being prefilled or runs. While slots are free, a step is launched late, halfway through the one that the
    device computes: requests that come until then, such as a client's next one after its last answer, need not wait for
    one step more. If the engine fails, such as for want of memory, all requests end with the finish
    reason "error", `submit` and `call` raise ServiceStopped, and `load` has the failure.
    """

    def __init__(self, engine: Engine, *, most_waiting: int = 64):
        """most_waiting: requests beyond those that the slots hold; 0: none has to wait for a slot."""
        check_whole("most_waiting", most_waiting, hint="0 takes as many requests as there are slots")
        self.engine, self.most_waiting = engine, most_waiting
        self._work = threading.Condition()  # never held during a step
        self._inbox: list[tuple[Request, Listener]] = []
        self._cancelled: list[Request] = []
        self._jobs: deque[tuple[Callable[[], object], Future]] = deque()
        self._stopped: str | None = "the service is not started; call start()"  # None: it takes requests
        self._closing = False
        self._failure: Exception | None = None
        self._submitted = 0  # written under the lock
        self._ended = 0  # written by the engine's thread, as everything below
        self._running, self._cache_share = 0, 0.0
        self._durations: deque[float] = deque(maxlen=_RECENT)  # seconds from the queue to the end
        self._retry_after = _UNKNOWN_RETRY
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)  # seconds
        self._launch_at = 0.0  # time of the next step, if slots are free
        self._listeners: dict[Request, Listener] = {}
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> "Service":
        """Start the thread."""
        self._stopped = None
        self._thread.start()
        return self

    def close(self) -> None:
        """End all requests with the finish reason "cancelled", and the thread."""
        with self._work:
            self._closing = True
            self._stopped = self._stopped or "the service is closed"
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> "Service":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        max_new_tokens: int,
        listener: Listener,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queue a prompt. The listener is called in the engine's thread, for each step that gave the request output.

        Its last call has the finish reason. It must return at once; if it raises, the request ends with the finish
        reason "error" and the listener is not called again. Raises InputError if the request can never be served,
        QueueFull if too many wait, and ServiceStopped.
        """
        return self.submit_many(prompt, [sampling], max_new_tokens, listener, [constraint])[0]

    def submit_many(
        self,
        prompt: Prompt,
        samplings: Sequence[Sampling],
        max_new_tokens: int,
        listener: Listener,
        constraints: Sequence[Constraint | None] | None = None,
    ) -> list[Request]:
        """Queue one request for each sampling, all with one prompt, which is read once; all or none, as `submit`."""
        count = len(samplings)
        most = self.engine.slots + self.most_waiting
        if count > most:
            raise InputError(f"{count} continuations of a prompt at once; this service holds at most {most} requests")
        self._check_room(count)  # first: a refusal costs no validation
        constraints = [None] * count if constraints is None else constraints
        requests = [
            self.engine.make_request(prompt, sampling, max_new_tokens, constraint)
            for sampling, constraint in zip(samplings, constraints, strict=True)
        ]
        with self._work:
            self._check_room(count)
            self._submitted += count
            self._inbox += [(request, listener) for request in requests]
            self._work.notify()
        return requests

    def cancel(self, request: Request) -> None:
        """End a request before the next step, with the finish reason "cancelled"; its slot is free then."""
        with self._work:
            if not self._closing and self._failure is None:
                self._cancelled.append(request)
                self._work.notify()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function in the engine's thread, between two steps: the device computes one thing at a time."""
        future: Future[Result] = Future()
        with self._work:
            self._check_running()
            self._jobs.append((function, future))
            self._work.notify()
        return future

    def load(self) -> Load:
        """Return the present load."""
        totals, running = self.engine.totals, self._running
        return Load(
            running,
            max(self._submitted - self._ended - running, 0),
            self._cache_share,
            totals.prefix_queries,
            totals.prefix_hits,
            None if self._failure is None else _described(self._failure),
        )

    def totals(self) -> Totals:
        """Return what the engine has done since its start."""
        return self.engine.totals

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise ServiceStopped(self._stopped) from self._failure

    def _check_room(self, count: int) -> None:
        self._check_running()
        held = self._submitted - self._ended
        if held + count > self.engine.slots + self.most_waiting:
            raise QueueFull(max(held - self._running, 0), self._retry_after)

    def _loop(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            LOG.exception("the engine failed")
            self._fail(error)

    def _turn(self) -> bool:
        """Wait for work, take over what was handed in, run a job and a step; return False once closed."""
        with self._work:
            while self.engine.idle and not (self._inbox or self._cancelled or self._jobs or self._closing):
                self._work.wait()
            while len(self._inbox) < self.engine.spare_slots and not (self._jobs or self._closing):
                if not self._work.wait(self._launch_at - time.perf_counter()):
                    break
            closing = self._closing
            new, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            job = self._jobs.popleft() if self._jobs and not closing else None
        for request, listener in new:
            self._listeners[request] = listener
            self.engine.enqueue(request)
        for request in [*self._listeners] if closing else cancelled:
            self.engine.cancel(request)
        if job is not None:
            _run(*job)
        start = time.perf_counter()
        changed = self.engine.step()
        now = time.perf_counter()
        self._steps.append(now - start)
        self._launch_at = now + _LAUNCH_AT * min(self._steps)
        for request in changed:
            self._deliver(request)
        self._measure()
        if closing:
            self._drop_jobs("the service is closed")
        return not closing

    def _deliver(self, request: Request) -> None:
        """Hand the request's new output to its listener."""
        listener = self._listeners.get(request)
        if listener is None:  # it failed
            return
        if request.finish_reason is not None:
            self._forget(request)
        try:
            update = request.take()
            if update.finish_reason is not None or update.text or update.tokens:
                listener(request, update)
        except Exception as error:
            LOG.exception("a listener failed; its request ends")
            self.engine.fail(request, error)
            if request in self._listeners:
                self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._listeners[request]
        self._ended += 1
        if request.started is not None and request.finished is not None:
            self._durations.append(request.finished - request.started)

    def _measure(self) -> None:
        """Update what other threads read."""
        engine = self.engine
        held = sum(len(request.prompt) + len(request.tokens) for request in engine.running)
        self._running = sum(request.started is not None for request in self._listeners)
        self._cache_share = held / (engine.slots * engine.capacity)
        if self._durations:  # busy slots free one another's place at this interval
            interval = sum(self._durations) / len(self._durations) / engine.slots
            self._retry_after = min(max(interval, _SHORTEST_RETRY), _LONGEST_RETRY)

    def _fail(self, error: Exception) -> None:
        """End everything with this error; the engine is not used again."""
        with self._work:
            self._failure = error
            self._stopped = f"the engine failed: {_described(error)}; restart the service"
            new, self._inbox = self._inbox, []
        self._listeners.update(new)
        for request, listener in [*self._listeners.items()]:
            self._forget(request)
            if request.finish_reason is None:
                request.fail(error)
            try:
                listener(request, request.take())
            except Exception:
                LOG.exception("a listener failed")
        self._running, self._cache_share = 0, 0.0
        self._drop_jobs(self._stopped)

    def _drop_jobs(self, reason: str) -> None:
        while self._jobs:
            _, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(ServiceStopped(reason))


def _run(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

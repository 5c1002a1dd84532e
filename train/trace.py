"""A profiler's trace of a few steps, for TensorBoard or Perfetto."""

from pathlib import Path
from typing import Any

import jax

_STEPS = range(5, 10)  # of a process: after the first ones, which are slower


class Trace:
    """Starts and stops by itself; `folder` None: no trace. What is begun is ended by `close`."""

    def __init__(self, folder: Path | None):
        self._folder, self._step, self._running = folder, 0, False

    def step(self, state: Any) -> None:
        """Call before every step, with what it waits for."""
        if self._folder is not None and self._step == _STEPS.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._step == _STEPS.stop:
            self.close(state)
        self._step += 1

    def close(self, state: Any = None) -> None:
        """End a trace under way, once `state` is there."""
        if self._running:
            self._running = False
            jax.block_until_ready(state)
            jax.profiler.stop_trace()

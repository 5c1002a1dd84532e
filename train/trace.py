"""Record a profiler's trace of a few steps, for TensorBoard or Perfetto."""

from pathlib import Path
from typing import Any

import jax

_STEPS = range(5, 10)  # of a process; the first steps are slower


class Trace:
    """Start and stop a trace at fixed steps; folder None: no trace. `close` ends a trace that is still running."""

    def __init__(self, folder: Path | None):
        self._folder, self._step, self._running = folder, 0, False

    def step(self, state: Any) -> None:
        """Start or stop the trace if it is time; call this before every step, with the state that the step reads."""
        if self._folder is not None and self._step == _STEPS.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._step == _STEPS.stop:
            self.close(state)
        self._step += 1

    def close(self, state: Any = None) -> None:
        """End a running trace after `state` has been computed."""
        if self._running:
            self._running = False
            jax.block_until_ready(state)
            jax.profiler.stop_trace()

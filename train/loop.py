"""The shell around the pure step: data in, metrics and checkpoints out, and nothing lost on a kill.

The loop never waits for the device: it dispatches step t, then handles the metrics of step t − 1.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import ModelConfig
from model.errors import InputError
from model.sharding import make_mesh
from train.config import HParams, TrainConfig, stack_hparams
from train.data import load_manifest, validation_batches
from train.lanes import Lanes, Program, compile_program
from train.progress import progress_bar
from train.trial import Result, Shell, Trial


def train(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: HParams,
    *,
    data: str | Path,
    run: str | Path,
    steps: int | None = None,
    shell: Shell = Shell(),
) -> Result:
    """Train until `steps` updates are made (None: the schedule's horizon). The same call again resumes the run.

    Raises InputError on bad input, before anything is written, and KeyboardInterrupt after Ctrl-C or SIGTERM,
    once the state is saved.
    """
    return population(config, train_config, [hparams], data=data, runs=[run], steps=steps, shell=shell)[0]


def population(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: Sequence[HParams],
    *,
    data: str | Path,
    runs: Sequence[str | Path],
    steps: int | None = None,
    shell: Shell = Shell(),
) -> list[Result]:
    """Train one lane per entry of `hparams`, all in one compiled program, each with a run directory of its own.

    A lane ends at its own horizon (`hparams.total_steps`, or `steps`) and is frozen from there on; one that goes
    non-finite ends as "diverged" and changes no bit of its neighbours. Raises as `train` does.
    """
    _check(config, train_config, hparams, runs)
    manifest = load_manifest(data)
    if manifest.vocab_size > config.vocab_size:
        raise InputError(
            f"the data's vocabulary of {manifest.vocab_size} exceeds the model's vocab_size={config.vocab_size}"
        )
    mesh = make_mesh(shell.mesh)
    if train_config.batch_size % mesh.size:
        raise InputError(f"batch_size={train_config.batch_size} does not divide over {mesh.size} devices")
    with ExitStack() as stack:
        lanes = []
        for values, folder in zip(hparams, runs, strict=True):
            lanes.append(Trial(config, train_config, values, Path(folder), data, manifest.hash, steps, shell))
            stack.callback(lanes[-1].close)
        if not all(lane.ended for lane in lanes):
            try:
                _Loop(config, train_config, lanes, data, mesh, shell).run()
            except Exception:
                for lane in lanes:
                    lane.fail()
                raise
        return [lane.result() for lane in lanes]


class _Loop:
    """One population on its way; made once, run once."""

    def __init__(self, config, train_config, lanes: list[Trial], data, mesh, shell: Shell):
        self.lanes, self.shell = lanes, shell
        self.program: Program = compile_program(config, train_config, len(lanes), mesh)
        self.hparams = stack_hparams([lane.hparams for lane in lanes])
        self.validation = validation_batches(
            data,
            batch_size=train_config.batch_size,
            seq_len=train_config.seq_len,
            max_tokens=shell.evaluate_tokens,
            segment_documents=train_config.segment_documents,
        )
        self.state = self._start()
        self.pending: tuple[list[tuple[int, Trial, int]], Any, dict[int, list[Any]]] | None = None
        self.clock = self.saved_at = time.perf_counter()

    def run(self) -> None:
        remaining = sum(lane.stop - lane.step for lane in self.lanes if lane.active)
        for lane in self.lanes:  # killed between its last checkpoint and the note that it is finished
            if not lane.ended and not lane.active:
                lane.end("finished", self._compile_share())
        with _interruptible() as interrupted, progress_bar(self.shell.description, remaining) as advance:
            self._save([lane for lane in self.lanes if lane.active and lane.step == 0])
            self.clock = time.perf_counter()
            while any(lane.active for lane in self.lanes) and not interrupted():
                advance(self._step(), self._note())
            self._handle_pending()
            stopped = [lane for lane in self.lanes if lane.active]
            self._save(stopped)
            for lane in stopped:
                lane.checkpoints.wait()
                lane.end("interrupted", self._compile_share())
            if interrupted():  # also when it came during the last step: the caller must not go on with the next run
                raise KeyboardInterrupt

    def _step(self) -> int:
        """Dispatch one step of every active lane; how many there were."""
        active = np.array([lane.active for lane in self.lanes])
        rows = [lane.loader.batch(lane.step) for lane in self.lanes]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        self.state, metrics = self.program.step(self.state, batch, self.hparams, active)
        stepped = []
        for index, lane in enumerate(self.lanes):
            if active[index]:
                lane.step += 1
                stepped.append((index, lane, lane.step))
        evaluated = {index: self._evaluate(index) for index, lane, step in stepped if self._evaluation_due(lane)}
        self._handle_pending()
        self.pending = (stepped, metrics, evaluated)
        finished = [lane for _, lane, step in stepped if step == lane.stop]
        due = [lane for _, lane, _ in stepped if self._checkpoint_due(lane)]
        if finished or due:
            self._handle_pending()
            self._save([lane for lane in {*finished, *due} if not lane.ended])
            self.saved_at = time.perf_counter()
            for lane in finished:
                if not lane.ended:
                    lane.checkpoints.wait()
                    lane.end("finished", self._compile_share())
            self.clock = time.perf_counter()
        return len(stepped)

    def _handle_pending(self) -> None:
        """Write the metrics of the step before the one under way; this is where the loop may wait."""
        if self.pending is None:
            return
        (stepped, metrics, evaluated), self.pending = self.pending, None
        metrics, evaluated = jax.device_get((metrics, evaluated))
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        for index, lane, step in stepped:
            if lane.ended:
                continue  # it diverged a step ago; this step was not taken
            values = {name: float(value[index]) for name, value in metrics.items()}
            if not values["finite"]:
                self._diverge(lane, step)
                continue
            if index in evaluated:
                nats, tokens = np.array(evaluated[index], np.float64).sum(axis=0).tolist()
                values["validation_loss"] = nats / tokens
            lane.write(step, values, seconds)

    def _diverge(self, lane: Trial, step: int) -> None:
        lane.step = step - 1
        lane.checkpoints.wait()
        lane.end("diverged", self._compile_share())

    def _evaluation_due(self, lane: Trial) -> bool:
        every = self.shell.evaluate_every
        return lane.step == lane.stop or (every > 0 and lane.step % every == 0)

    def _checkpoint_due(self, lane: Trial) -> bool:
        every = self.shell.checkpoint_every
        if every > 0 and lane.step % every == 0:
            return True
        return time.perf_counter() - self.saved_at > self.shell.checkpoint_seconds

    def _evaluate(self, index: int) -> list[Any]:
        return [self.program.evaluate(self.state, np.int32(index), batch) for batch in self.validation]

    def _start(self) -> Lanes:
        fresh = self.program.init(self.hparams)
        like = jax.eval_shape(lambda lanes: jax.tree.map(lambda leaf: leaf[0], lanes.state), fresh)
        restored = [lane.resume(like) for lane in self.lanes]
        if all(state is None for state in restored):
            return fresh
        host = jax.device_get(fresh.state)
        solo = [
            jax.tree.map(lambda leaf, index=index: leaf[index], host) if state is None else state
            for index, state in enumerate(restored)
        ]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *solo)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh.state)
        return fresh.replace(state=jax.device_put(stacked, shardings))  # type: ignore[attr-defined]

    def _save(self, lanes: list[Trial]) -> None:
        if not lanes:
            return
        host = jax.device_get(self.state.state)
        for index, lane in enumerate(self.lanes):
            if lane in lanes:
                if lane.log is not None:
                    lane.log.flush()
                lane.checkpoints.save(lane.step, jax.tree.map(lambda leaf, index=index: leaf[index].copy(), host))

    def _compile_share(self) -> float:
        return self.program.compile_seconds / len(self.lanes)

    def _note(self) -> str:
        losses = [lane.last["loss"] for lane in self.lanes if lane.last]
        return f"loss {min(losses):.3f}" if losses else ""


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that the step under way is finished and saved."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check(config: ModelConfig, train_config: TrainConfig, hparams: Sequence[HParams], runs: Sequence) -> None:
    if not hparams:
        raise InputError("a population needs at least one lane")
    if len(hparams) != len(runs):
        raise InputError(f"{len(hparams)} sets of hyperparameters but {len(runs)} run folders were given")
    if len({str(Path(run).absolute()) for run in runs}) < len(runs):
        raise InputError("two lanes have the same run folder; every lane needs its own")
    if config.stack != "decoder" or config.head != "language-model":
        raise InputError(
            f"a run trains decoders on plain text, not stack={config.stack!r} with head={config.head!r}; "
            "use train_step with batches of your own"
        )
    if train_config.seq_len > config.max_seq_len:
        raise InputError(
            f"seq_len={train_config.seq_len} is longer than the model's context, max_seq_len={config.max_seq_len}"
        )

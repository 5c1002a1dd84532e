"""The shell around the pure step: data in, metrics and checkpoints out, and nothing lost on a kill.

The loop never waits for the device: it dispatches step t, then handles the metrics of step t − 1. With several
processes all of them run it; they take the same decisions because they take them from the same numbers.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from model import ModelConfig
from model.errors import InputError
from model.sharding import check_batch, default_axes, make_mesh
from train.agreement import CHECKPOINT, STOP, Agreement
from train.branch import Branch
from train.config import HParams, TrainConfig, stack_hparams
from train.data import validation_batches
from train.data.folders import Data
from train.feed import Feed
from train.hosts import agree, is_writer
from train.interrupt import interruptible
from train.lanes import Program, batch_spec, compile_program
from train.memory import device_memory
from train.microbatch import choose_cuts
from train.peak import peak_flops_per_second
from train.phases import Plan, Stage
from train.progress import progress_bar
from train.result import Result
from train.shell import Shell
from train.state import TrainState
from train.trace import Trace
from train.trial import Trial

logger = logging.getLogger("isoflop")
Folder = str | Path


def train(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: HParams,
    *,
    data: Folder | Mapping[str, Folder],
    run: Folder,
    steps: int | None = None,
    shell: Shell = Shell(),
    branch: Branch | None = None,
) -> Result:
    """Train until `steps` updates are made (None: the schedule's horizon). The same call again resumes the run.

    data: a prepared folder, or several by the names that mixtures use, the first for validation too. branch: where it
    leaves another run (`train.branch`). Raises InputError on bad input, before anything is written, and
    KeyboardInterrupt after Ctrl-C or SIGTERM, once the state is saved.
    """
    branches = None if branch is None else [branch]
    return population(
        config, train_config, [hparams], data=data, runs=[run], steps=steps, shell=shell, branches=branches
    )[0]


def population(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: Sequence[HParams],
    *,
    data: Folder | Mapping[str, Folder],
    runs: Sequence[Folder],
    steps: int | None = None,
    shell: Shell = Shell(),
    branches: Sequence[Branch] | None = None,
) -> list[Result]:
    """Train one lane per entry of `hparams`, all in one compiled program, each with a run directory of its own.

    A lane ends at its own horizon (`hparams.total_steps`, or `steps`) and is frozen from there on; one that goes
    non-finite for `max_skipped` steps ends as "diverged" and changes no bit of its neighbours. Raises as `train` does.
    """
    _check(config, train_config, hparams, runs, shell)
    opened = Data.open(data)
    for name, source in opened.sources.items():
        if source.manifest.vocab_size > config.vocab_size:
            raise InputError(
                f"the vocabulary of {name} ({source.manifest.vocab_size}) exceeds the model's "
                f"vocab_size={config.vocab_size}"
            )
    batches = {
        stage.batch_size // train_config.accumulate
        for stage in Plan.of(train_config, None if train_config.phases else 1).stages
    }
    mesh = make_mesh(shell.mesh or default_axes(math.gcd(*batches)))
    train_config = choose_cuts(config, train_config, len(hparams), mesh, shell)
    for stage in Plan.of(train_config, None if train_config.phases else 1).stages:
        check_batch(mesh, stage.batch_size // train_config.accumulate, stage.seq_len)
    with ExitStack() as stack:
        lanes = []
        for number, (values, folder) in enumerate(zip(hparams, runs, strict=True)):
            branch = branches[number] if branches else None
            lanes.append(Trial(config, train_config, values, Path(folder), opened, steps, shell, branch))
            stack.callback(lanes[-1].close)
        if not all(lane.ended for lane in lanes):
            try:
                _Loop(config, train_config, lanes, opened.first, mesh, shell).run(stack)
            except Exception:
                for lane in lanes:
                    lane.fail()
                raise
        return [lane.result() for lane in lanes]


class _Step(NamedTuple):
    """A step under way. taken: (number of the lane, its life, the step's number) of every lane that takes it."""

    taken: list[tuple[int, int, int]]
    metrics: Any
    evaluated: dict[int, list[Any]]


class _Loop:
    """One population on its way; made once, run once."""

    def __init__(self, config, train_config: TrainConfig, lanes: list[Trial], data: Folder, mesh, shell: Shell):
        self.config, self.train_config, self.lanes, self.mesh, self.shell = config, train_config, lanes, mesh, shell
        self.pending: _Step | None = None
        self.spent = {"data_seconds": 0.0, "dispatch_seconds": 0.0}  # since the clock was last read
        self.compile_seconds = 0.0
        self._compile(self._earliest(lanes))
        self.hparams = stack_hparams([lane.hparams for lane in lanes])
        self.validation = validation_batches(
            data,
            batch_size=train_config.batch_size,
            seq_len=train_config.seq_len,
            max_tokens=shell.evaluate_tokens,
            segment_documents=train_config.segment_documents,
        )
        self.feed = Feed(mesh, lanes, batch_spec(train_config))
        self.agreement = Agreement(mesh)
        self.peak = peak_flops_per_second(config.compute_dtype)[0] * mesh.size
        self.state = self._start()
        self.dispatched = self.saved_after = 0
        self.trace = Trace(lanes[0].run.folder / "profile" if shell.profile else None)
        self.clock = self.saved_at = time.perf_counter()

    def run(self, stack: ExitStack) -> None:
        stack.callback(self.feed.close)
        stack.callback(lambda: self.trace.close(self.state))
        for lane in self.lanes:  # killed between its last checkpoint and the note that it is finished
            if not lane.ended and not lane.active:
                lane.end("finished", self._compile_share())
        remaining = sum(lane.stop - lane.step for lane in self.lanes if lane.active)
        with interruptible() as interrupted, progress_bar(self.shell.description, remaining) as advance:
            self._save([lane for lane in self.lanes if lane.active and not agree(lane.checkpoints.steps)])
            self.clock = time.perf_counter()
            while any(lane.active for lane in self.lanes) and not self.agreement.has(STOP):
                advance(self._step(interrupted), self._note())
            self._handle_pending()
            stopped = [lane for lane in self.lanes if lane.active]
            self._save(stopped)
            for lane in stopped:
                lane.checkpoints.wait()
                lane.end("interrupted", self._compile_share())
            if interrupted() or self.agreement.has(STOP):  # also in the last step: the caller must not go on
                raise KeyboardInterrupt

    def _step(self, interrupted: Callable[[], bool]) -> int:
        """Dispatch one step of every lane that is active and in the earliest stage; how many there were."""
        self._enter(self._earliest(lane for lane in self.lanes if lane.active))
        request, begin = self._request(), time.perf_counter()
        batch = self.feed.take(request, self.stage)
        ready = time.perf_counter()
        active = np.isin(np.arange(len(self.lanes)), [number for number, _ in request])
        self.trace.step(self.state)
        self.state, metrics = self.program.step(self.state, batch, self.hparams, active)
        self.agreement.ask(STOP * interrupted() | CHECKPOINT * self._is_time_to_save())
        for number, _ in request:
            self.lanes[number].step += 1
        if upcoming := self._request():
            self.feed.prepare(upcoming, self.stage)
        self.spent["data_seconds"] += ready - begin
        self.spent["dispatch_seconds"] += time.perf_counter() - ready
        taken = [(number, self.lanes[number].lives, step + 1) for number, step in request]
        evaluated = {n: self._evaluate(n) for n, *_ in taken if self._evaluation_due(self.lanes[n])}
        self._handle_pending()
        self.pending = _Step(taken, metrics, evaluated)
        self.dispatched += 1
        lanes = [self.lanes[number] for number, life, _ in taken if self.lanes[number].lives == life]
        finished = [lane for lane in lanes if lane.step == lane.stop]
        due = [lane for lane in lanes if self._checkpoint_due(lane)]
        if finished or due:
            self._handle_pending()
            self._save([lane for lane in lanes if lane in [*finished, *due] and not lane.ended])
            self.saved_at, self.saved_after = time.perf_counter(), self.dispatched
            for lane in finished:
                if not lane.ended and lane.step == lane.stop:
                    lane.checkpoints.wait()
                    lane.end("finished", self._compile_share())
            self.clock = time.perf_counter()
        return len(taken)

    def _enter(self, stage: Stage) -> None:
        """Go on with a stage; nothing where it is the one under way."""
        if stage.index != self.stage.index:
            self._handle_pending()
            self._compile(stage)

    def _earliest(self, lanes: Iterable[Trial]) -> Stage:
        """The stage that is first in the plan, of those that the lanes are in."""
        return min((lane.stage for lane in lanes), key=lambda stage: stage.index)

    def _compile(self, stage: Stage) -> None:
        """Have the program of a stage."""
        self.stage = stage
        self.program: Program = compile_program(self.config, self.train_config, len(self.lanes), self.mesh, stage)
        self.compile_seconds += self.program.compile_seconds
        if self.shell.announce and is_writer():
            self._announce(stage)
        self.clock = time.perf_counter()

    def _announce(self, stage: Stage) -> None:
        """The memory that the program needs, against what there is."""
        limit = self.shell.memory or device_memory(self.mesh.local_devices[0])
        memory, cuts = self.program.memory, self.train_config.accumulate
        cut = f" in {cuts} cuts" if cuts > 1 else ""
        print(f"memory: {memory.describe(limit)} for {stage.batch_size} × {stage.seq_len} tokens{cut}", file=sys.stderr)
        if not memory.fits(limit):
            logger.warning("that may not fit: try --microbatch auto, a mesh with fsdp=N, or --set remat=full")

    def _request(self) -> tuple[tuple[int, int], ...]:
        """Who takes part in the next step of this stage, and with which of its steps."""
        here = lambda lane: lane.active and lane.stage.index == self.stage.index
        return tuple((number, lane.step) for number, lane in enumerate(self.lanes) if here(lane))

    def _handle_pending(self) -> None:
        """Write the metrics of the step before the one under way; this is where the loop may wait."""
        if self.pending is None:
            return
        (taken, metrics, evaluated), self.pending = self.pending, None
        begin = time.perf_counter()
        metrics, evaluated = jax.device_get((metrics, evaluated))
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        timing = {"seconds": seconds, "step_seconds": seconds, "device_seconds": now - begin} | self.spent
        self.spent = dict.fromkeys(self.spent, 0.0)
        work = [self.lanes[number].flops_of_step(step) for number, _, step in taken]
        timing["mfu"] = sum(work) / seconds / self.peak
        for number, life, step in taken:
            lane = self.lanes[number]
            if lane.ended or lane.lives != life:
                continue  # it diverged, or was put back, a step ago: this step does not count
            values = {name: float(value[number]) for name, value in metrics.items()}
            diverged = values["skipped_in_a_row"] >= self.train_config.max_skipped
            if lane.is_spike(values["loss"]) and not diverged:
                self._roll_back(number, lane, step, values["loss"])
                continue
            if number in evaluated:
                nats, tokens = np.array(evaluated[number], np.float64).sum(axis=0).tolist()
                values["validation_loss"] = nats / tokens
            per_second = lane.plan.stage(step - 1).tokens_per_step / max(seconds, 1e-9)
            lane.write(step, values, timing | {"tokens_per_second": per_second})
            if diverged:
                self._diverge(lane, step)

    def _diverge(self, lane: Trial, step: int) -> None:
        lane.step = step
        lane.checkpoints.wait()
        lane.end("diverged", self._compile_share())

    def _roll_back(self, number: int, lane: Trial, step: int, loss: float) -> None:
        lane.checkpoints.wait()
        if not lane.roll_back(step, loss):
            self._diverge(lane, step)
            return
        back = lane.rollbacks[-1]
        said = "%s: loss %.4g at step %d is a spike; back to step %d, past that data"
        logger.warning(said, lane.run.folder, loss, step, lane.step)
        state = lane.checkpoints.restore(back["to"], self.program.lane)
        self.state = self.program.put(self.state, np.int32(number), state)

    def _evaluation_due(self, lane: Trial) -> bool:
        every = self.shell.evaluate_every
        return lane.step == lane.stop or (every > 0 and lane.step % every == 0)

    def _checkpoint_due(self, lane: Trial) -> bool:
        # Of several processes' wishes some are heard after they were met.
        by_time = self.agreement.has(CHECKPOINT) and self.dispatched > self.saved_after + 2
        return by_time or self.shell.plans_checkpoint(lane.step)

    def _is_time_to_save(self) -> bool:
        return time.perf_counter() - self.saved_at > self.shell.checkpoint_seconds

    def _evaluate(self, number: int) -> list[Any]:
        sums: list[Any] = [np.zeros(2, np.float32)]
        for batch in self.validation:
            sums.append(self.program.evaluate(self.state, np.int32(number), batch, sums[-1]))
        return sums[1:]

    def _start(self) -> TrainState:
        state = self.program.init(self.hparams)
        for number, lane in enumerate(self.lanes):
            restored = lane.resume(self.program.lane)
            if restored is not None:
                state = self.program.put(state, np.int32(number), restored)
        return state

    def _save(self, lanes: list[Trial]) -> None:
        for lane in lanes:
            if lane.log is not None:
                lane.log.flush()
            score = lane.last.get("validation_loss") if lane.last.get("step") == lane.step else None
            state = self.program.take(self.state, np.int32(self.lanes.index(lane)))
            lane.checkpoints.save(lane.step, state, score)

    def _compile_share(self) -> float:
        return self.compile_seconds / len(self.lanes)

    def _note(self) -> str:
        losses = [lane.last["loss"] for lane in self.lanes if lane.last.get("loss") is not None]
        return f"loss {min(losses):.3f}" if losses else ""


def _check(
    config: ModelConfig, train_config: TrainConfig, hparams: Sequence[HParams], runs: Sequence, shell: Shell
) -> None:
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
    longest = max([train_config.seq_len, *(phase.seq_len or 0 for phase in train_config.phases)])
    if longest > config.max_seq_len:
        raise InputError(f"seq_len={longest} is longer than the model's context, max_seq_len={config.max_seq_len}")
    planned = shell.checkpoint_every or shell.keep_every or shell.keep_steps
    if train_config.spike_sigma > 0 and not planned:
        raise InputError(
            f"spike_sigma={train_config.spike_sigma} needs checkpoint_every (or keep_every): where a run goes back to "
            "must not depend on the clock"
        )

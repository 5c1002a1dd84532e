"""Run the loop around the pure step: data in, metrics and checkpoints out, and nothing lost on a kill.

It does not wait for the step that it dispatches: it dispatches step t, then handles the metrics of step t − 1. With
several processes all of them run it; they take the same decisions because they base them on the same numbers.
"""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from model import Execution, Params
from model.adapters import divide
from model.sharding import parts_of_lanes, shardings
from train.hosts import agree, is_writer
from train.interrupt import interruptible
from train.lanes.build import compacts, compile_program, frozen_shapes
from train.lanes.program import LaneStates, Program
from train.lanes.slots import Slots
from train.loop.feed import BatchKey, Feed, Slot
from train.loop.member import Member
from train.loop.memory import device_memory
from train.loop.options import RunOptions
from train.objectives.objective import Batch, merge
from train.peak import peak_flops_per_second
from train.plan import Stage
from train.preemption import CHECKPOINT, STOP, PreemptionSync
from train.progress import progress_bar, say
from train.recipe import Weights
from train.start import Bases, lay_out
from train.task_sets import PackedTasks
from train.trace import Trace

logger = logging.getLogger("isoflop")


class _Step(NamedTuple):
    """Step that is dispatched and whose metrics have not been read yet.

    taken: each slot, with the generation that its member had. evaluated: the validation sums of members, by number.
    scored: the nats of their packed tasks.
    """

    taken: list[tuple[Slot, int]]
    metrics: Any
    evaluated: dict[int, list[Any]]
    scored: dict[int, list[Any]]


class Loop:
    """Train one population; built once, run once."""

    def __init__(
        self,
        members: list[Member],
        lanes: int,
        validation: list[Batch],
        tasks: PackedTasks,
        bases: Bases,
        mesh: Mesh,
        options: RunOptions,
        execution: Execution,
    ):
        config, train_config = members[0].config, members[0].train_config  # the same in all members
        self.config, self.train_config, self.execution = config, train_config, execution
        self.objective = members[0].objective
        self.members, self.mesh, self.options = members, mesh, options
        self.validation, self.tasks = validation, tasks
        # The result of the latest batch of any lane's evaluation, which the next one takes: see `evaluate_lane`.
        self.before: Any = np.zeros(len(self.objective.EVALUATED) + 1, np.float32)
        self.slots = self._compacted(Slots(lanes, tuple(range(len(members)))))
        self.pending: _Step | None = None
        self.spent = {"data_seconds": 0.0, "dispatch_seconds": 0.0}  # since the clock was last read
        self.compile_seconds = 0.0
        if options.announce and is_writer():
            for line in members[0].loader.describe_packing():
                say(line)
        self._compile(self._earliest(members))
        self.feed = Feed(mesh, members)
        self.preemption = PreemptionSync(mesh)
        self.peak = peak_flops_per_second(config.compute_dtype) * mesh.size
        self.frozen = self._frozen(bases)
        self.state = self._start(bases)
        bases.close()
        self.dispatched = self.saved_after = 0
        self.trace = Trace(members[0].run.folder / "profile" if options.profile else None)
        self.clock = self.saved_at = time.perf_counter()

    def run(self, stack: ExitStack) -> None:
        """Train until every member has ended. Callbacks that close what was opened are pushed onto `stack`."""
        stack.callback(self.feed.close)
        stack.callback(lambda: self.trace.close(self.state))
        for member in self.members:  # those killed between the last checkpoint and the record of the end
            if not member.ended and member.done:
                member.end("finished", self._compile_share())
        remaining = sum(member.stop - member.step for member in self._active())
        with interruptible() as interrupted, progress_bar(self.options.description, remaining) as advance:
            if self.options.checkpoint_start:
                self._save([member for member in self._active() if not agree(member.checkpoints.steps)])
            self.clock = time.perf_counter()
            while self._active() and not self.preemption.is_requested(STOP):
                advance(self._step(interrupted), self._note())
            self._handle_pending()
            stopped = self._active()
            self._save(stopped)
            for member in stopped:
                member.checkpoints.wait()
                member.end("interrupted", self._compile_share())
            if interrupted() or self.preemption.is_requested(STOP):  # also in the last step: the caller must stop
                raise KeyboardInterrupt

    def _step(self, interrupted: Callable[[], bool]) -> int:
        """Dispatch one step of every active member in the earliest stage; return how many took part."""
        self._enter(self._earliest(self._active()))
        key, begin = self._next_batch(), time.perf_counter()
        batch = self.feed.take(key, self.stage)
        ready = time.perf_counter()
        active = np.isin(np.arange(self.program.lanes), [slot.lane for slot in key.slots])
        self.trace.step(self.state)
        self.state, metrics = self.program.step(self.state, batch, self.hparams, active, self.frozen)
        self.preemption.request(STOP * interrupted() | CHECKPOINT * self._is_time_to_save())
        for slot in key.slots:
            self.members[slot.member].step += 1
        if (upcoming := self._next_batch()).slots:
            self.feed.prepare(upcoming, self.stage)
        self.spent["data_seconds"] += ready - begin
        self.spent["dispatch_seconds"] += time.perf_counter() - ready
        taken = [(slot, self.members[slot.member].generation) for slot in key.slots]
        evaluated, scored = {}, {}
        for slot in key.slots:
            if self._evaluation_due(self.members[slot.member]):
                evaluated[slot.member] = self._evaluate(slot.lane)
                if self.tasks.batches:
                    scored[slot.member] = self._score(slot.lane)
        self._handle_pending()
        self.pending = _Step(taken, metrics, evaluated, scored)
        self.dispatched += 1
        if evaluated and (self.options.patience or self.options.keep_best):  # this step may be the last
            self._handle_pending()
        members = []  # without those that were rolled back meanwhile
        for slot, generation in taken:
            if self.members[slot.member].generation == generation:
                members.append(self.members[slot.member])
        finished = [member for member in members if member.done]
        due = [member for member in members if member.improved or self._checkpoint_due(member)]
        if finished or due:
            self._handle_pending()
            self._save([member for member in members if member in [*finished, *due] and not member.ended])
            self.saved_at, self.saved_after = time.perf_counter(), self.dispatched
            for member in finished:
                if not member.ended and member.done:
                    member.checkpoints.wait()
                    member.end("finished", self._compile_share())
            self.clock = time.perf_counter()
        return len(taken)

    def _active(self) -> list[Member]:
        return [member for member in self.members if member.active]

    def _enter(self, stage: Stage) -> None:
        """Switch to a stage and to as few lanes as needed; do nothing if both are the current ones."""
        slots = self._compacted(self.slots)
        if stage.index == self.stage.index and slots == self.slots:
            return
        self._handle_pending()
        slots, before = self._compacted(self.slots), self.slots  # the pending step may have ended some members
        if slots != before:
            self.state = self.program.compact(self.state, slots.sources(before))
            self.slots = slots
        self._compile(stage)

    def _compacted(self, slots: Slots) -> Slots:
        """Return the slots without the members that have ended, if that saves work; else the same slots."""
        remaining = {number for number, member in enumerate(self.members) if not member.ended}
        if len(remaining) == len(self.members) or not compacts(self.options.compact):
            return slots
        return slots.compacted(remaining, parts_of_lanes(self.mesh))

    def _earliest(self, members: Iterable[Member]) -> Stage:
        """Return the earliest stage in the plan that any of the members is in."""
        return min((member.stage for member in members), key=lambda stage: stage.index)

    def _compile(self, stage: Stage) -> None:
        """Compile the program of a stage for the current number of lanes, or fetch it from the cache."""
        self.stage = stage
        start = time.perf_counter()  # almost no time if this process has compiled it before
        self.program: Program = compile_program(
            self.config,
            self.train_config,
            self.slots.lanes,
            self.mesh,
            stage,
            self.execution,
            self.objective,
            self.tasks.row,
        )
        self.compile_seconds += time.perf_counter() - start
        self.hparams = self.program.place(self.slots.stack([member.hparams for member in self.members]))
        if self.options.announce and is_writer():
            self._announce(stage)
        self.clock = time.perf_counter()

    def _announce(self, stage: Stage) -> None:
        """Print the memory that the program needs, and warn if the device has less."""
        limit = self.options.memory or device_memory(self.mesh.local_devices[0])
        memory, count = self.program.memory, self.execution.accumulate
        split = f" in {count} microbatches" if count > 1 else ""
        say(f"memory: {memory.describe(limit)} for {stage.batch_size} × {stage.seq_len} tokens{split}")
        if not memory.fits(limit):
            logger.warning("that may not fit: try --microbatch auto, a mesh with fsdp=N, or --set remat=full")

    def _next_batch(self) -> BatchKey:
        """Return the key of the next step's batch: the active members in this stage, each with its own step number."""
        slots = []
        for lane, number in enumerate(self.slots.members):
            member = self.members[number]
            if member.active and member.stage.index == self.stage.index:
                slots.append(Slot(lane, number, member.step))
        return BatchKey(self.program, tuple(slots))

    def _handle_pending(self) -> None:
        """Read and record the metrics of the pending step; only here does the loop wait for the device."""
        if self.pending is None:
            return
        (taken, metrics, evaluated, scored), self.pending = self.pending, None
        begin = time.perf_counter()
        metrics, evaluated, scored = jax.device_get((metrics, evaluated, scored))
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        timing = {"seconds": seconds, "step_seconds": seconds, "device_seconds": now - begin} | self.spent
        self.spent = dict.fromkeys(self.spent, 0.0)
        flops = sum(self.members[slot.member].flops_of_step(slot.step + 1) for slot, _ in taken)
        timing["mfu"] = flops / seconds / self.peak
        for slot, generation in taken:
            member, step = self.members[slot.member], slot.step + 1
            if member.ended or member.generation != generation:
                continue  # it diverged or was rolled back one step ago: this step does not count
            values = {name: value[slot.lane].item() for name, value in metrics.items()}
            diverged = values["skipped_in_a_row"] >= self.train_config.max_skipped
            if member.is_spike(values["loss"]) and not diverged:
                self._roll_back(slot.lane, member, step, values["loss"])
                continue
            if slot.member in evaluated:
                # Of every batch: the weighted sums of the means, then the weight; see `evaluate_lane`.
                *sums, weight = np.array(evaluated[slot.member], np.float64).sum(axis=0).tolist()
                for name, total in zip(self.objective.EVALUATED, sums, strict=True):
                    values[f"validation_{name}"] = total / weight
            of_tasks = self.tasks.results(scored[slot.member]) if slot.member in scored else []
            per_second = member.plan.stage(step - 1).tokens_per_step / max(seconds, 1e-9)
            member.write(step, values, timing | {"tokens_per_second": per_second}, of_tasks)
            if diverged:
                self._diverge(member, step)

    def _diverge(self, member: Member, step: int) -> None:
        member.step = step
        member.checkpoints.wait()
        member.end("diverged", self._compile_share())

    def _roll_back(self, lane: int, member: Member, step: int, loss: float) -> None:
        member.checkpoints.wait()
        if not member.roll_back(step, loss):
            self._diverge(member, step)
            return
        back = member.rollbacks[-1]
        message = "%s: loss %.4g at step %d is a spike; back to step %d, past that data"
        logger.warning(message, member.run.folder, loss, step, member.step)
        state = member.checkpoints.restore(back["to"], self.program.lane)
        self.state = self.program.put(self.state, lane, state)

    def _evaluation_due(self, member: Member) -> bool:
        every = self.options.evaluate_every
        return member.step == member.stop or (every > 0 and member.step % every == 0)

    def _checkpoint_due(self, member: Member) -> bool:
        # With several processes a request arrives one step late, so one that a save has just met must not count again.
        by_time = self.preemption.is_requested(CHECKPOINT) and self.dispatched > self.saved_after + 2
        return by_time or self.options.plans_checkpoint(member.step)

    def _is_time_to_save(self) -> bool:
        return time.perf_counter() - self.saved_at > self.options.checkpoint_seconds

    def _evaluate(self, lane: int) -> list[Any]:
        sums = []
        for batch in self.validation:
            self.before = self.program.evaluate(self.state, lane, batch, self.before, self.hparams, self.frozen)
            sums.append(self.before)
        return sums

    def _score(self, lane: int) -> list[Any]:
        """Return the nats of the packed tasks, batch by batch."""
        scored = []
        for batch in self.tasks.batches:
            nats, self.before = self.program.score(self.state, lane, batch, self.before, self.hparams, self.frozen)
            scored.append(nats)
        return scored

    def _frozen(self, bases: Bases) -> Params:
        """Return the parameters that no lane trains, on the devices."""
        shapes = frozen_shapes(self.config, self.objective)
        if not shapes:
            return shapes
        start = self.members[0].recipe.start
        assert isinstance(start, Weights)  # the same in all members
        return jax.device_put(self.objective.frozen(bases.of(start)), shardings(self.mesh, shapes))

    def _start(self, bases: Bases) -> LaneStates:
        state = self.program.init(self.hparams)
        for lane, number in enumerate(self.slots.members):
            member = self.members[number]
            restored = member.resume(self.program.lane)
            if restored is None and isinstance(member.recipe.start, Weights):
                fresh = self.program.take(state, lane)
                given, _ = self.objective.split(bases.of(member.recipe.start))
                for name in bases.lacking(member.recipe.start):
                    given[name] = fresh.params[name]
                if given:
                    params = merge(divide(fresh.params)[0], given)
                    restored = fresh.replace(params=lay_out(params, self.program.lane.params))  # type: ignore[attr-defined]
            if restored is not None:
                state = self.program.put(state, lane, restored)
        return state

    def _save(self, members: list[Member]) -> None:
        for member in members:
            member.sync()
            score = member.last.get(self.options.metric) if member.last.get("step") == member.step else None
            lane = self.slots.lane(self.members.index(member))
            base = member.plan.stage(max(member.step - 1, 0)).rope_base
            config = {} if base is None or member.step == 0 else {"rope_base": base}
            member.checkpoints.save(member.step, self.program.take(self.state, lane), score, config)

    def _compile_share(self) -> float:
        return self.compile_seconds / len(self.members)

    def _note(self) -> str:
        losses = [member.last["loss"] for member in self.members if member.last.get("loss") is not None]
        return f"loss {min(losses):.3f}" if losses else ""

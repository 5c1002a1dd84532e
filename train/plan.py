"""The plan of a run in phases: which step has which shape, data and learning rate, by arithmetic alone.

A phase is a number of tokens with data, shapes and rates of its own. Its batches may grow, so a phase is one or more
stages: stretches of steps of one shape, for which one program is compiled.
"""

import bisect
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.errors import InputError
from train.config import HParams, TrainConfig
from train.phases import RateShape


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of steps of one shape.

    phase: its name; index: the stage's own number in the plan. first_step: the number of its first update, from 0;
    first_token: tokens seen before it. mixture, rope_base: as in `Phase`, with rope_base from earlier phases kept.
    rate, initial, final: the shape and the two ends of the phase's factor of the peak; first_share, last_share: how
    much of the phase's tokens is seen before and after the stage.
    """

    phase: str
    index: int
    first_step: int
    steps: int
    first_token: int
    batch_size: int
    seq_len: int
    mixture: tuple[tuple[str, float], ...] = ()
    rope_base: float | None = None
    rate: RateShape = "constant"
    initial: float = 1.0
    final: float = 1.0
    first_share: float = 0.0
    last_share: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one batch."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of all its steps."""
        return self.steps * self.tokens_per_step

    @property
    def end_step(self) -> int:
        """The number of the first update after it."""
        return self.first_step + self.steps

    @property
    def last_step(self) -> int:
        """The number of its last update."""
        return self.end_step - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """All stages of a run, in order. A step past the end belongs to the last stage, which then goes on."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, train_config: TrainConfig, steps: int | None = None) -> "Plan":
        """The plan of a run of `steps` updates.

        Without phases it is one stage. With them their tokens decide, each stage's rounded up to whole steps; `steps`
        may be less than the plan has (the run then stops before its end), and None is all of it. Raises InputError
        where `steps` is more, or missing without phases.
        """
        if not train_config.phases:
            if steps is None or steps < 1:
                raise InputError(f"steps={steps} must be at least 1: give steps, or total_steps in the hyperparameters")
            return cls((Stage("all", 0, 0, steps, 0, train_config.batch_size, train_config.seq_len),))
        plan = cls(tuple(_stages(train_config)))
        if steps is not None and not 1 <= steps <= plan.total_steps:
            raise InputError(f"steps={steps} must lie between 1 and the {plan.total_steps} steps of the run's phases")
        return plan

    @property
    def total_steps(self) -> int:
        """Updates of the whole plan."""
        return self.stages[-1].end_step

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole plan."""
        return self.stages[-1].first_token + self.stages[-1].tokens

    def stage(self, step: int) -> Stage:
        """The stage of update number `step`, from 0. Raises InputError for a negative one."""
        if step < 0:
            raise InputError(f"step={step} must not be negative")
        return self.stages[bisect.bisect_right([stage.first_step for stage in self.stages], step) - 1]

    def tokens(self, step: int) -> int:
        """Tokens seen after `step` updates."""
        stage = self.stage(step)
        return stage.first_token + (step - stage.first_step) * stage.tokens_per_step


def _stages(train_config: TrainConfig) -> list[Stage]:
    stages: list[Stage] = []
    step = token = 0
    rope_base, factor = None, 0.0
    for phase in train_config.phases:
        seq_len = phase.seq_len or train_config.seq_len
        sizes = phase.batch_sizes or (train_config.batch_size,)
        ends = [phase.tokens * number // len(sizes) for number in range(len(sizes) + 1)]
        shares = [end - start for start, end in itertools.pairwise(ends)]
        steps = [-(-share // (size * seq_len)) for share, size in zip(shares, sizes, strict=True)]
        total = sum(count * size * seq_len for count, size in zip(steps, sizes, strict=True))
        rope_base = rope_base if phase.rope_base is None else phase.rope_base
        seen = 0
        for count, size in zip(steps, sizes, strict=True):
            tokens = count * size * seq_len
            stages.append(
                Stage(
                    phase=phase.name,
                    index=len(stages),
                    first_step=step,
                    steps=count,
                    first_token=token,
                    batch_size=size,
                    seq_len=seq_len,
                    mixture=phase.mixture,
                    rope_base=rope_base,
                    rate=phase.rate,
                    initial=factor,
                    final=phase.final,
                    first_share=seen / total,
                    last_share=(seen + tokens) / total,
                )
            )
            step, token, seen = step + count, token + tokens, seen + tokens
        factor = phase.final
    return stages


def phases_rate(plan: Plan, hparams: HParams, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update number `step` (the first is 0): the peak times the phase's factor at the update's end.

    So the first update of a warm-up from 0 already moves, and the last one of a phase has its `final`. Past the end
    the last rate stays.
    """
    return hparams.learning_rate * _factor(plan, step)


def _factor(plan: Plan, step: Int[Array, "..."]) -> Float[Array, "..."]:
    """Shares of a phase, not tokens, are what is traced: a count of tokens does not fit an int32."""
    of = lambda value: jnp.asarray(np.array([value(stage) for stage in plan.stages], np.float32))
    ends = np.array([stage.end_step for stage in plan.stages], np.int32)
    index = jnp.minimum(jnp.searchsorted(ends, step, side="right"), len(plan.stages) - 1)
    done = step + 1 - jnp.asarray(np.array([stage.first_step for stage in plan.stages], np.int32))[index]
    per_step = of(lambda stage: (stage.last_share - stage.first_share) / stage.steps)
    share = jnp.minimum(of(lambda stage: stage.first_share)[index] + done * per_step[index], 1.0)
    is_cosine, is_constant = of(lambda stage: stage.rate == "cosine"), of(lambda stage: stage.rate == "constant")
    way = jnp.where(is_cosine[index] > 0, 0.5 * (1 - jnp.cos(jnp.pi * share)), share)
    way = jnp.where(is_constant[index] > 0, 1.0, way)
    return of(lambda stage: stage.initial)[index] * (1 - way) + of(lambda stage: stage.final)[index] * way


def describe(plan: Plan) -> list[dict[str, Any]]:
    """One row per stage: phase, first and last step (from 1), tokens before and after, shapes, mixture, rates.

    rate_first and rate_last: the factor of the peak at the stage's first and last update; a run without phases takes
    its factor from the schedule instead.
    """
    ends = jnp.array([[stage.first_step, stage.last_step] for stage in plan.stages])
    rates = jax.jit(functools.partial(_factor, plan))(ends).tolist()
    return [
        {
            "phase": stage.phase,
            "first_step": stage.first_step + 1,
            "last_step": stage.end_step,
            "tokens_before": stage.first_token,
            "tokens_after": stage.first_token + stage.tokens,
            "batch_size": stage.batch_size,
            "seq_len": stage.seq_len,
            "mixture": dict(stage.mixture),
            "rate_first": rates[stage.index][0],
            "rate_last": rates[stage.index][1],
            "rope_base": stage.rope_base,
        }
        for stage in plan.stages
    ]

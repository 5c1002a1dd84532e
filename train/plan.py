"""Plan a run in phases: compute by arithmetic alone which step has which shape, data and learning rate.

A phase is a number of tokens with data, shapes and rates of its own. Its batch size may grow, so a phase consists of
one or more stages: consecutive steps of one shape, for which one program is compiled.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.errors import InputError, check_whole
from train.config import HParams, Order, TrainConfig
from train.phases import RateShape


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive steps of one shape.

    phase: its name; index: the stage's number in the plan. first_step: the number of its first update, from 0;
    first_token: tokens seen before it. mixture, rope_base: as in `Phase`, with rope_base carried over from earlier
    phases. rate, initial, final: the shape and the two ends of the phase's factor of the peak; first_share, last_share:
    the share of the phase's tokens that has been seen before and after the stage.
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
        """Return the tokens in one batch."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Return the tokens of all its steps."""
        return self.steps * self.tokens_per_step

    @property
    def end_step(self) -> int:
        """Return the number of the first update after it."""
        return self.first_step + self.steps

    @property
    def last_step(self) -> int:
        """Return the number of its last update."""
        return self.end_step - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """All stages of a run, in order. Steps past the end belong to the last stage. order: of the rows of an epoch."""

    stages: tuple[Stage, ...]
    order: Order = "shuffled"

    @classmethod
    def of(cls, train_config: TrainConfig, steps: int | None = None) -> "Plan":
        """Return the plan of a run of `steps` updates.

        Without phases it is one stage. With phases, their tokens determine it, each stage rounded up to whole steps;
        `steps` may be fewer than the plan has (the run then stops early), None means all. Raises InputError if `steps`
        is more than that, or missing without phases.
        """
        if not train_config.phases:
            hint = "give steps, or total_steps in the hyperparameters"
            if steps is None:
                raise InputError(f"steps=None leaves the length of the run open; {hint}")
            check_whole("steps", steps, 1, hint=hint)
            stage = Stage("all", 0, 0, steps, 0, train_config.batch_size, train_config.seq_len)
            return cls((stage,), train_config.order)
        plan = cls(tuple(_stages(train_config)), train_config.order)
        if steps is not None:
            check_whole("steps", steps, 1, plan.total_steps, hint="the run's phases have no more steps")
        return plan

    @property
    def total_steps(self) -> int:
        """Return the number of updates of the whole plan."""
        return self.stages[-1].end_step

    @property
    def total_tokens(self) -> int:
        """Return the tokens of the whole plan."""
        return self.stages[-1].first_token + self.stages[-1].tokens

    def stage(self, step: int) -> Stage:
        """Return the stage of update number `step`, from 0. Raises InputError for a negative one."""
        if step < 0:
            raise InputError(f"step={step} must not be negative")
        starts = [stage.first_step for stage in self.stages]  # starts at 0, 10 and 30: step 10 is in the second stage
        return self.stages[bisect.bisect_right(starts, step) - 1]

    def tokens(self, step: int) -> int:
        """Return the tokens seen after `step` updates."""
        stage = self.stage(step)
        return stage.first_token + (step - stage.first_step) * stage.tokens_per_step


def _stages(train_config: TrainConfig) -> list[Stage]:
    """Return the stages of all phases.

    Example: a phase of 1,000 tokens with rows of 10 tokens and batches of 4 and 8 rows has 500 tokens for each size:
    ⌈500 / 40⌉ = 13 steps (520 tokens), then ⌈500 / 80⌉ = 7 steps (560 tokens).
    """
    stages: list[Stage] = []
    step = token = 0
    rope_base, factor = None, 0.0
    for phase in train_config.phases:
        seq_len = phase.seq_len or train_config.seq_len
        sizes = phase.batch_sizes or (train_config.batch_size,)
        ends = [phase.tokens * number // len(sizes) for number in range(len(sizes) + 1)]
        shares = [end - start for start, end in itertools.pairwise(ends)]
        steps = [-(-share // (size * seq_len)) for share, size in zip(shares, sizes, strict=True)]  # rounded up
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
    """Return the rate of update number `step` (the first is 0): the peak times the phase's factor after the update.

    Therefore the first update of a warm-up from 0 has a positive rate, and the last update of a phase has `final`. Past
    the end of the plan the last rate is kept.
    """
    return hparams.learning_rate * _factor(plan, step)


def _factor(plan: Plan, step: Int[Array, "..."]) -> Float[Array, "..."]:
    """Return the factor of the peak after update number `step`.

    Shares of a phase are traced instead of tokens, whose count does not fit an int32. Example: in a linear phase from
    0 to 1 with one stage of the steps 10–14, update 11 is the second of five: share 0.4, factor 0.4.
    """

    def by_stage(value: Callable[[Stage], float]) -> Array:
        return jnp.asarray(np.array([value(stage) for stage in plan.stages], np.float32))

    ends = np.array([stage.end_step for stage in plan.stages], np.int32)
    index = jnp.minimum(jnp.searchsorted(ends, step, side="right"), len(plan.stages) - 1)
    done = step + 1 - jnp.asarray(np.array([stage.first_step for stage in plan.stages], np.int32))[index]
    per_step = by_stage(lambda stage: (stage.last_share - stage.first_share) / stage.steps)
    share = jnp.minimum(by_stage(lambda stage: stage.first_share)[index] + done * per_step[index], 1.0)
    is_cosine = by_stage(lambda stage: stage.rate == "cosine")
    is_constant = by_stage(lambda stage: stage.rate == "constant")
    progress = jnp.where(is_cosine[index] > 0, 0.5 * (1 - jnp.cos(jnp.pi * share)), share)  # from initial to final
    progress = jnp.where(is_constant[index] > 0, 1.0, progress)
    return (
        by_stage(lambda stage: stage.initial)[index] * (1 - progress)
        + by_stage(lambda stage: stage.final)[index] * progress
    )


def describe(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per stage: phase, first and last step (from 1), tokens before and after, shapes, mixture, rates.

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

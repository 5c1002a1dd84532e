"""Compute learning-rate schedules by arithmetic on traced scalars: a new horizon or warm-up compiles nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from train.config import HParams, Schedule, TrainConfig
from train.plan import Plan, phases_rate


def rate(train_config: TrainConfig, hparams: HParams, step: Int[Array, ""]) -> Float[Array, ""]:
    """Return the rate of update number `step` (the first is 0), by the run's phases or else by its schedule."""
    if train_config.phases:
        return phases_rate(Plan.of(train_config), hparams, step)
    return learning_rate(train_config.schedule, hparams, step)


def learning_rate(schedule: Schedule, hparams: HParams, step: Int[Array, ""]) -> Float[Array, ""]:
    """Return the rate of update number `step` (the first is 0).

    Linear warm-up to the peak over `warmup_steps` updates (0: `warmup_fraction` of `total_steps`, to the nearest
    step), then by name: "constant"; "linear" and "cosine" to `final_fraction` of the peak at `total_steps`; "wsd" (Hu
    et al. 2024) constant, then linear over the last `decay_steps` (0: `decay_fraction`) of `total_steps`; after the
    horizon the final rate is kept. "inverse_sqrt" (Vaswani et al. 2017, section 5.3) falls with 1/√step from the end of
    the warm-up on, without end.
    """
    step = step.astype(jnp.float32)
    total = jnp.maximum(hparams.total_steps, 1).astype(jnp.float32)
    final = hparams.final_fraction
    warmup = jnp.where(hparams.warmup_steps > 0, hparams.warmup_steps, jnp.round(hparams.warmup_fraction * total))
    warm = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0.0, 1.0)
    match schedule:
        case "constant":
            factor = jnp.ones((), jnp.float32)
        case "linear":
            factor = 1 - (1 - final) * progress
        case "cosine":
            factor = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        case "wsd":
            given = jnp.minimum(hparams.decay_steps, total)
            decay_steps = jnp.maximum(jnp.where(given > 0, given, hparams.decay_fraction * total), 1)
            factor = 1 - (1 - final) * jnp.clip((step - (total - decay_steps)) / decay_steps, 0.0, 1.0)
        case "inverse_sqrt":
            peak = jnp.maximum(warmup, 1)
            factor = jnp.sqrt(peak / jnp.maximum(step + 1, peak))
    return hparams.learning_rate * warm * factor


def uses_horizon(train_config: TrainConfig, hparams: HParams) -> bool:
    """Return whether a rate depends on `total_steps`, so that a longer run is a different run."""
    if train_config.phases:
        return False
    by_fraction = hparams.warmup_steps == 0 and hparams.warmup_fraction > 0
    return train_config.schedule not in ("constant", "inverse_sqrt") or bool(by_fraction)

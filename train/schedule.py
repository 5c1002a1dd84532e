"""Learning-rate schedules as arithmetic on traced scalars: a new horizon or warm-up compiles nothing."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from train.config import HParams, Schedule


def learning_rate(schedule: Schedule, hparams: HParams, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update number `step` (the first is 0).

    Linear warm-up to the peak over `warmup_steps` updates, then by name: "constant"; "linear" and "cosine" to
    `final_fraction` of the peak at `total_steps`; "wsd" (Hu et al. 2024) constant, then linear over the last
    `decay_fraction` of `total_steps`. Past the horizon the final rate stays.
    """
    step = step.astype(jnp.float32)
    total = jnp.maximum(hparams.total_steps, 1).astype(jnp.float32)
    warmup = jnp.asarray(hparams.warmup_steps).astype(jnp.float32)
    final = hparams.final_fraction
    warm = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0.0, 1.0)
    if schedule == "constant":
        factor = jnp.ones(())
    elif schedule == "linear":
        factor = 1 - (1 - final) * progress
    elif schedule == "cosine":
        factor = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:
        decay_steps = jnp.maximum(hparams.decay_fraction * total, 1)
        factor = 1 - (1 - final) * jnp.clip((step - (total - decay_steps)) / decay_steps, 0.0, 1.0)
    return hparams.learning_rate * warm * factor


def uses_horizon(schedule: Schedule) -> bool:
    """Whether the schedule depends on `total_steps`, so that a longer run is another run."""
    return schedule != "constant"

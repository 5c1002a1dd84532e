"""Optimizers from Optax with traced hyperparameters, and what they apply to."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model import ModelConfig, Params
from model.parameterization import Family, decays, names_of, rate_multipliers
from train.config import HParams, TrainConfig


def make_optimizer(config: ModelConfig, train_config: TrainConfig, hparams: HParams) -> optax.GradientTransformation:
    """The update before the learning rate: AdamW (Loshchilov and Hutter 2019), each role at its own multiple of the
    rate (`model.parameterization`), decay on matrices only and at the plain rate.
    """
    return optax.chain(
        optax.scale_by_adam(b1=hparams.beta1, b2=hparams.beta2, eps=hparams.epsilon),
        scale_by_role(config, "adam"),
        optax.add_decayed_weights(hparams.weight_decay, mask=decay_mask),
    )


def scale_by_role(config: ModelConfig, family: Family) -> optax.GradientTransformation:
    """Multiply every update by its role's learning-rate multiplier; nothing is computed where all are 1."""

    def update(updates: Params, params: Params | None = None) -> Params:
        multipliers = rate_multipliers(config, updates, family)
        return jax.tree.map(lambda leaf, factor: leaf if factor == 1 else leaf * factor, updates, multipliers)

    return optax.stateless(update)


def decay_mask(params: Params) -> Any:
    """True where weight decay applies; a parameter without a role in the table is an error."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(names_of(path)), params)


def clip_by_norm(grads: Params, norm: Float[Array, ""], clip_norm: Float[Array, ""]) -> Params:
    """Scale so that the global norm is at most `clip_norm`; 0 does nothing (Pascanu et al. 2013)."""
    factor = jnp.where(clip_norm > 0, jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)), 1.0)
    return jax.tree.map(lambda grad: grad * factor, grads)

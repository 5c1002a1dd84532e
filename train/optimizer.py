"""Optimizers from Optax with traced hyperparameters, and what they apply to."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model import Params
from model.parameterization import decays
from train.config import HParams, TrainConfig


def make_optimizer(train_config: TrainConfig, hparams: HParams) -> optax.GradientTransformation:
    """The update direction, before the learning rate: AdamW (Loshchilov and Hutter 2019), decay on matrices only."""
    return optax.chain(
        optax.scale_by_adam(b1=hparams.beta1, b2=hparams.beta2, eps=hparams.epsilon),
        optax.add_decayed_weights(hparams.weight_decay, mask=decay_mask),
    )


def decay_mask(params: Params) -> Any:
    """True where weight decay applies; a parameter without a role in the table is an error."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(tuple(str(key.key) for key in path)), params)


def clip_by_norm(grads: Params, norm: Float[Array, ""], clip_norm: Float[Array, ""]) -> Params:
    """Scale so that the global norm is at most `clip_norm`; 0 does nothing (Pascanu et al. 2013)."""
    factor = jnp.where(clip_norm > 0, jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)), 1.0)
    return jax.tree.map(lambda grad: grad * factor, grads)

"""Optimizers from Optax with traced hyperparameters, and what they apply to."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model import ModelConfig, Params
from model.parameterization import Family, decays, names_of, rate_multipliers, role_of
from train.config import HParams, Optimizer, TrainConfig

FAMILIES: dict[Optimizer, Family] = {"adamw": "adam", "sgd": "sgd", "muon": "muon"}
MUON_RMS = 0.2  # of an update's entries, about Adam's: one learning rate and decay for both (Liu et al. 2025, eq. 4)
ORTHOGONALIZED = ("hidden", "residual")  # the roles that Muon is for; tables, vectors and the readout are Adam's


def make_optimizer(config: ModelConfig, train_config: TrainConfig, hparams: HParams) -> optax.GradientTransformation:
    """The update before the learning rate: a direction by name, each role at its own multiple of the rate
    (`model.parameterization`), decay on matrices only and at the plain rate (Loshchilov and Hutter 2019).

    "adamw"; "sgd", with momentum beta1; "muon" (Jordan et al. 2024), with momentum beta1, and Adam where it does not
    apply.
    """
    adam = optax.scale_by_adam(b1=hparams.beta1, b2=hparams.beta2, eps=hparams.epsilon)
    match train_config.optimizer:
        case "adamw":
            direction = adam
        case "sgd":
            direction = optax.trace(decay=hparams.beta1)
        case "muon":
            direction = optax.partition({"muon": _muon(hparams), "adam": adam}, _muon_or_adam)
    return optax.chain(
        direction,
        scale_by_role(config, FAMILIES[train_config.optimizer]),
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


def _muon(hparams: HParams) -> optax.GradientTransformation:
    """Momentum with its singular values set near 1, times 0.2 · √max(fan_in, fan_out)."""
    # A leaf's last two axes are one matrix; the axes before them count layers and experts, each orthogonalised alone.
    axes = lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree)
    to_rms = lambda leaf: leaf * (MUON_RMS * max(leaf.shape[-2:]) ** 0.5)
    return optax.chain(
        optax.contrib.scale_by_muon(beta=hparams.beta1, eps=hparams.epsilon, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates)),
    )


def _muon_or_adam(params: Params) -> Any:
    label = lambda path: "muon" if role_of(names_of(path)) in ORTHOGONALIZED else "adam"
    return jax.tree_util.tree_map_with_path(lambda path, _: label(path), params)

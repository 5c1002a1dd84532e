"""Build optimizers from Optax with traced hyperparameters, scaled by the role of each parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model import ModelConfig, Params
from model.parameterization import Family, decays, names_of, rate_multipliers, role_of
from train.config import HParams, Optimizer, TrainConfig

# The column of the table of roles that scales an optimizer's rates. The entries of Lion's and Adafactor's updates do
# not depend on the size of the gradient, like Adam's, so they scale with width as Adam's do.
FAMILIES: dict[Optimizer, Family] = {
    **dict.fromkeys(("adamw", "adam", "adafactor", "lion"), "adam"),
    "sgd": "sgd",
    "muon": "muon",
}
MUON_RMS = 0.2  # of an update's entries, about Adam's: one learning rate and decay for both (Liu et al. 2025, eq. 4)
ORTHOGONALIZED = ("hidden", "residual")  # the roles that Muon is for; tables, vectors and the readout are Adam's


def make_optimizer(config: ModelConfig, train_config: TrainConfig, hparams: HParams) -> optax.GradientTransformation:
    """Return the transformation of gradients into updates, before the learning rate.

    Each role has its own multiple of the rate (`model.parameterization`); decay applies to matrices only, at the plain
    rate (Loshchilov and Hutter 2019). The optimizers by name: "adamw"; "adam" (Kingma and Ba 2015), whose decay is
    added to the gradient instead; "sgd", with momentum beta1; "adafactor" (Shazeer and Stern 2018), see below; "lion"
    (Chen et al. 2023), the sign of beta1's mean with a momentum of beta2; "muon" (Jordan et al. 2024), with momentum
    beta1, and Adam where it does not apply.
    """
    adam = optax.scale_by_adam(b1=hparams.beta1, b2=hparams.beta2, eps=hparams.epsilon)
    decay = optax.add_decayed_weights(hparams.weight_decay, mask=decay_mask)
    by_role = scale_by_role(config, FAMILIES[train_config.optimizer])
    match train_config.optimizer:
        case "adamw":
            direction = adam
        case "adam":
            return optax.chain(decay, adam, by_role)
        case "sgd":
            direction = optax.trace(decay=hparams.beta1)
        case "adafactor":
            direction = _adafactor(hparams.lora_rank)
        case "lion":
            direction = optax.scale_by_lion(b1=hparams.beta1, b2=hparams.beta2)
        case "muon":
            direction = optax.partition({"muon": _muon(hparams), "adam": adam}, _muon_or_adam)
    return optax.chain(direction, by_role, decay)


def scale_by_role(config: ModelConfig, family: Family) -> optax.GradientTransformation:
    """Multiply every update by its role's learning-rate multiplier; a multiplier of 1 adds no operation."""

    def update(updates: Params, params: Params | None = None) -> Params:
        multipliers = rate_multipliers(config, updates, family)
        return jax.tree.map(lambda leaf, factor: leaf if factor == 1 else leaf * factor, updates, multipliers)

    return optax.stateless(update)


def decay_mask(params: Params) -> Any:
    """Return a tree that is true where weight decay applies; a parameter without a role in the table is an error."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(names_of(path)), params)


def clip_by_norm(grads: Params, norm: Float[Array, ""], clip_norm: Float[Array, ""]) -> Params:
    """Scale gradients so that their global norm is at most `clip_norm`; 0: no clipping (Pascanu et al. 2013)."""
    factor = jnp.where(clip_norm > 0, jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)), 1.0)
    return jax.tree.map(lambda grad: grad * factor, grads)


def _adafactor(lora_rank: Any) -> optax.GradientTransformation:
    """Return Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) without momentum and relative steps.

    The second moment is kept as row and column means if both axes have at least 128 entries, its decay is 1 − t^−0.8,
    and every matrix's update is clipped to an RMS of 1.

    In a low-rank factor only the columns below `lora_rank` (0: all) count in that RMS, as the others are masked, and
    its second moment is never factored: a lane of a smaller rank then equals an adapter of that rank.
    """

    def transformation(path: tuple[str, ...], leaf: Any) -> optax.GradientTransformation:
        axis = {"adapter_a": -1, "adapter_b": -2}.get(role_of(path))
        if axis is None:
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        columns = leaf.shape[axis]
        counted = jnp.where(lora_rank > 0, jnp.minimum(lora_rank, columns), columns)
        share = jnp.sqrt(counted / columns).astype(jnp.float32)  # Optax's mean is over the masked zeros too
        return optax.chain(optax.scale_by_factored_rms(factored=False), optax.clip_by_block_rms(share))

    return _per_matrix(transformation)


def _per_matrix(transformation: Callable[[tuple[str, ...], Any], optax.GradientTransformation]) -> Any:
    """Apply a transformation to each matrix or vector of a stacked leaf separately.

    Optax treats a leaf as one parameter: it would factor the two longest axes of [layers, d_in, d_out], which may
    include the layers, and clip all layers by one RMS. The state has Optax's form, with trees like the parameters'.
    transformation: returns the transformation for a leaf, given its path and the leaf. All transformations must have
    states with the same tree structure.
    """

    def over_stack(path: tuple[Any, ...], leaf: Any, function: Any) -> Any:
        own_axes = 1 if role_of(names_of(path)) == "vector" else 2
        for _ in range(leaf.ndim - own_axes):
            function = jax.vmap(function)
        return function

    def init(params: Params) -> Any:
        def init_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
            return over_stack(path, leaf, transformation(names_of(path), leaf).init)(leaf)

        # A tree of states becomes a state of trees, as Optax has it.
        states = jax.tree_util.tree_map_with_path(init_leaf, params)
        return jax.tree.transpose(jax.tree.structure(params), None, states)

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        def update_leaf(path: tuple[Any, ...], leaf: Any, *rest: Any) -> Any:
            return over_stack(path, leaf, transformation(names_of(path), leaf).update)(leaf, *rest)

        outer = jax.tree.structure(params)
        any_leaf = transformation(("embedding", "tokens"), None).init
        inner = jax.tree.structure(jax.eval_shape(any_leaf, jnp.zeros(1, jnp.float32)))
        states = jax.tree.transpose(inner, outer, state)
        pairs = jax.tree_util.tree_map_with_path(update_leaf, updates, states, params)
        return jax.tree.transpose(outer, None, pairs)

    return optax.GradientTransformation(init, update)


def _muon(hparams: HParams) -> optax.GradientTransformation:
    """Return Muon: momentum with its singular values set near 1, times 0.2 · √max(fan_in, fan_out)."""

    # A leaf's last two axes are one matrix; those along the other axes (layers, experts) are orthogonalised separately.
    def last_two_axes(tree: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree)

    def to_rms(leaf: Array) -> Array:
        return leaf * (MUON_RMS * max(leaf.shape[-2:]) ** 0.5)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=hparams.beta1, eps=hparams.epsilon, weight_dimension_numbers=last_two_axes),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates)),
    )


def _muon_or_adam(params: Params) -> Any:
    def label(path: tuple[Any, ...], _: Any) -> str:
        return "muon" if role_of(names_of(path)) in ORTHOGONALIZED else "adam"

    return jax.tree_util.tree_map_with_path(label, params)

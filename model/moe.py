"""A mixture of experts in place of the feed-forward: routing, the experts, and the losses that keep them in use."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.dispatch import through_experts
from model.feedforward import FeedForward, activation_of
from model.grouped import Matrices
from model.linear import Linear
from model.parameterization import constant, initializer
from model.parts import Experts
from model.sharding import constrain
from model.weights import Int8Experts, LowRank, matmul


class Routing(NamedTuple):
    """chosen: each token's experts, the best first; gates: their weights; probabilities: of all, summing to 1."""

    chosen: Int[Array, "tokens top_k"]
    gates: Float[Array, "tokens top_k"]
    probabilities: Float[Array, "tokens count"]


def route(
    experts: Experts, logits: Float[Array, "tokens count"], selection_bias: Float[Array, " count"] | None = None
) -> Routing:
    """Choose experts, in float32 (Mixtral; DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2).

    The bias counts in the choice of groups and of experts, never in the gates, and gets no gradient.
    """
    if experts.router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    else:
        scores = probabilities = jax.nn.softmax(logits)
    preference = jax.lax.stop_gradient(scores)
    if selection_bias is not None:
        preference = preference + jax.lax.stop_gradient(selection_bias)
    if experts.groups > 1:
        preference = jnp.where(_in_best_groups(experts, preference), preference, -jnp.inf)
    _, chosen = jax.lax.top_k(preference, experts.top_k)
    if experts.router == "softmax_of_chosen":
        gates = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1))
    else:
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if experts.normalise:
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(chosen, gates * experts.scale, probabilities)


def _in_best_groups(experts: Experts, preference: Float[Array, "tokens count"]) -> Bool[Array, "tokens count"]:
    """Whether each expert's group is among the best of the token."""
    by_group = preference.reshape(-1, experts.groups, experts.count // experts.groups)
    counted = min(1 if experts.group_score == "max" else 2, by_group.shape[-1])
    group_scores = jax.lax.top_k(by_group, counted)[0].sum(-1)
    _, best = jax.lax.top_k(group_scores, experts.top_groups)
    chosen = jax.nn.one_hot(best, experts.groups, dtype=bool).any(-2)
    return jnp.repeat(chosen, by_group.shape[-1], axis=-1)


def losses(
    routing: Routing, logits: Float[Array, "tokens count"], real: Bool[Array, " tokens"]
) -> dict[str, Float[Array, "..."]]:
    """balance_loss, router_z_loss and expert_use over the real tokens.

    balance_loss: count · Σ_e f_e · P_e, with f_e the share of choices that went to expert e and P_e its mean
    probability (Switch, eq. 4, where top_k is 1). It is 1 where all probabilities are equal, and at least 1 where all
    tokens agree; a batch of tokens that disagree can lie below 1, for f follows the ranks and P the sizes.
    router_z_loss: the mean squared logsumexp of the logits (ST-MoE, eq. 5). expert_use: f, dropped choices included.
    """
    count, top_k = logits.shape[-1], routing.chosen.shape[-1]
    weight = real.astype(jnp.float32) / jnp.maximum(real.sum(dtype=jnp.float32), 1)
    use = jnp.einsum("t,tke->e", weight / top_k, jax.nn.one_hot(routing.chosen, count, dtype=jnp.float32))
    return {
        "balance_loss": count * jnp.sum(use * (weight @ routing.probabilities)),
        "router_z_loss": weight @ jnp.square(jax.nn.logsumexp(logits, axis=-1)),
        "expert_use": use,
    }


class Router(nn.Module):
    """The logits of every expert, in float32 whatever x is, and the selection bias, if there is one."""

    config: ModelConfig
    experts: Experts

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens d_model"]
    ) -> tuple[Float[Array, "tokens count"], Float[Array, " count"] | None]:
        """x @ weight; products in bfloat16, as accelerators prefer for float32 too, would change choices."""
        experts, bias = self.experts, None
        if self.is_initializing():
            init = initializer(self.config, "router", x.shape[-1])
            weight = self.param("weight", init, (x.shape[-1], experts.count), jnp.float32)
            if experts.selection_bias:
                bias = self.param("selection_bias", constant(0.0), (experts.count,))
        else:
            weight = self.get_variable("params", "weight")
            if experts.selection_bias:
                bias = self.get_variable("params", "selection_bias").astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            return matmul(x.astype(jnp.float32), weight), bias


class ExpertWeights(nn.Module):
    """The stacked matrices: up and gate (gated only) [count, d_model, d_ff], down [count, d_ff, d_model]."""

    config: ModelConfig
    experts: Experts

    @nn.compact
    def __call__(self) -> dict[str, Matrices]:
        """By name, as they are stored."""
        config, experts = self.config, self.experts
        into, out_of = (experts.count, config.d_model, experts.d_ff), (experts.count, experts.d_ff, config.d_model)
        shapes = {"up": into, **({"gate": into} if config.gated else {}), "down": out_of}
        if not self.is_initializing():
            return {name: self.get_variable("params", name) for name in shapes}
        role = lambda name: "residual" if name == "down" else "hidden"
        init = lambda name, shape: initializer(config, role(name), shape[1])
        return {name: self.param(name, init(name, shape), shape, jnp.float32) for name, shape in shapes.items()}


def _constrained(weight: Matrices, inputs: str | None, outputs: str | None) -> Matrices:
    if isinstance(weight, LowRank):
        base = _constrained(weight.base, inputs, outputs)
        a, b = constrain(weight.a, "experts", inputs, None), constrain(weight.b, "experts", None, outputs)
        return LowRank(base, a, b, weight.mask, weight.scale)
    if not isinstance(weight, Int8Experts):
        return constrain(weight, "experts", inputs, outputs)
    return Int8Experts(
        constrain(weight.weight, "experts", inputs, outputs), constrain(weight.scale, "experts", outputs)
    )


class ExpertFeedForward(nn.Module):
    """Σ gate · expert(x) over the chosen experts, plus the shared expert; the fields are those of `Experts`.

    inference: dropless, whatever `experts.dispatch` says.
    """

    config: ModelConfig
    inference: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"], real: Bool[Array, "batch seq"] | None = None
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        """The output, and balance_loss, router_z_loss, expert_use [count] and dropped (both shares of choices).

        real: False for padding, which takes no part in any of these nor in anyone's capacity; its output is finite.
        """
        config, experts = self.config, self.config.experts
        assert experts is not None
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        x = jnp.where(real[..., None], x, 0)  # whatever stands in padding, it cannot spoil a gradient
        flat, flat_real = x.reshape(-1, x.shape[-1]), real.reshape(-1)
        logits, bias = Router(config, experts, name="router")(flat)
        routing = route(experts, logits, bias)
        weights = ExpertWeights(config, experts, name="experts")()
        # What fsdp splits is gathered here once, not for every block.
        axes = {name: (None, "hidden") if name != "down" else ("hidden", None) for name in weights}
        weights = {name: _constrained(weight, *axes[name]) for name, weight in weights.items()}
        activation = activation_of(config)

        def feed_forward(rows, product):
            hidden = product(rows, weights["up"])
            hidden = activation(product(rows, weights["gate"])) * hidden if config.gated else activation(hidden)
            return product(hidden, weights["down"])

        bounded = experts.dispatch == "capacity" and not self.inference
        made, taken = through_experts(
            flat,
            routing.chosen,
            flat_real,
            experts.count,
            feed_forward,
            capacity_factor=experts.capacity_factor if bounded else None,
        )
        y = jnp.sum(made * routing.gates[..., None], axis=1).astype(x.dtype).reshape(x.shape)
        if experts.shared_d_ff:
            shared = FeedForward(config, experts.shared_d_ff, name="shared")(x)
            if experts.shared_gate:
                shared = shared * jax.nn.sigmoid(Linear(config, 1, "router", name="shared_gate")(x))
            y = y + shared
        lost, tokens = (jnp.sum(x, dtype=jnp.float32) for x in (flat_real[:, None] & ~taken, flat_real))
        dropped = lost / jnp.maximum(tokens * experts.top_k, 1)
        return y, {**losses(routing, logits, flat_real), "dropped": dropped}

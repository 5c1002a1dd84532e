"""A mixture of experts in place of the feed-forward: router, experts and auxiliary losses."""

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
    """The choices of a router.

    chosen: the experts of each token, the best first. gates: the weights of the chosen experts' outputs. probabilities:
    of all experts, summing to 1.
    """

    chosen: Int[Array, "tokens top_k"]
    gates: Float[Array, "tokens top_k"]
    probabilities: Float[Array, "tokens count"]


def route(
    experts: Experts, logits: Float[Array, "tokens count"], selection_bias: Float[Array, " count"] | None = None
) -> Routing:
    """Choose the experts of each token, in float32 (Mixtral; DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2).

    selection_bias: added to the scores for the choice of groups and experts, not for the gates; it has no gradient.
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
    """Return whether each expert's group is among the token's top_groups.

    Eight experts in four groups are [0, 1], [2, 3], [4, 5], [6, 7]; if groups 1 and 2 are the best, 2 … 5 are True.
    """
    by_group = preference.reshape(-1, experts.groups, experts.count // experts.groups)
    counted = min(1 if experts.group_score == "max" else 2, by_group.shape[-1])
    group_scores = jax.lax.top_k(by_group, counted)[0].sum(-1)
    _, best = jax.lax.top_k(group_scores, experts.top_groups)
    chosen = jax.nn.one_hot(best, experts.groups, dtype=bool).any(-2)
    return jnp.repeat(chosen, by_group.shape[-1], axis=-1)


def losses(
    routing: Routing, logits: Float[Array, "tokens count"], real: Bool[Array, " tokens"]
) -> dict[str, Float[Array, "..."]]:
    """Return balance_loss, router_z_loss and expert_use [count], over the real tokens.

    balance_loss: count · Σ_e f_e · P_e, with f_e the share of choices for expert e and P_e its mean probability
    (Switch, eq. 4, where top_k is 1). It is 1 if all probabilities are equal, and at least 1 if all tokens agree; where
    tokens disagree it can be below 1, because f depends on ranks and P on magnitudes. router_z_loss: the mean squared
    logsumexp of the logits (ST-MoE, eq. 5). expert_use: f, dropped choices included.
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
    """The router's logits, in float32 for any dtype of x, and its selection bias, if it has one."""

    config: ModelConfig
    experts: Experts

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens d_model"]
    ) -> tuple[Float[Array, "tokens count"], Float[Array, " count"] | None]:
        """Return (x @ weight, selection bias). Accelerators' default bfloat16 products would change choices."""
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
    """The stacked matrices of the experts: up and gate [count, d_model, d_ff], down [count, d_ff, d_model]."""

    config: ModelConfig
    experts: Experts

    @nn.compact
    def __call__(self) -> dict[str, Matrices]:
        """Return the matrices by name, as they are stored; "gate" only where the config is gated."""
        config, experts = self.config, self.experts
        names = ("up", "gate", "down") if config.gated else ("up", "down")
        if not self.is_initializing():
            return {name: self.get_variable("params", name) for name in names}
        weights = {}
        for name in names:
            role, d_in, d_out = "hidden", config.d_model, experts.d_ff
            if name == "down":
                role, d_in, d_out = "residual", experts.d_ff, config.d_model
            init = initializer(config, role, fan_in=d_in)
            weights[name] = self.param(name, init, (experts.count, d_in, d_out), jnp.float32)
        return weights


def _constrained(weight: Matrices, inputs: str | None, outputs: str | None) -> Matrices:
    """Constrain the sharding of stacked matrices; inputs, outputs: the logical axes of d_in and d_out."""
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
    """Σ gate · expert(x) over the chosen experts, plus the shared expert if there is one; see `model.parts.Experts`.

    inference: drop nothing, also where `experts.dispatch` is "capacity".
    """

    config: ModelConfig
    inference: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"], real: Bool[Array, "batch seq"] | None = None
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        """Return the output, and {"balance_loss", "router_z_loss", "expert_use" [count], "dropped"}.

        expert_use and dropped are shares of all choices. real: False for padding, which counts in none of these and
        takes no capacity; its output is finite.
        """
        config, experts = self.config, self.config.experts
        assert experts is not None
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        x = jnp.where(real[..., None], x, 0)  # NaN in padding would reach the gradients
        flat, flat_real = x.reshape(-1, x.shape[-1]), real.reshape(-1)
        logits, bias = Router(config, experts, name="router")(flat)
        routing = route(experts, logits, bias)
        weights = ExpertWeights(config, experts, name="experts")()
        # Matrices that fsdp splits are gathered here, once, instead of for every block.
        for name, weight in weights.items():
            inputs, outputs = ("hidden", None) if name == "down" else (None, "hidden")
            weights[name] = _constrained(weight, inputs, outputs)
        activation = activation_of(config)

        def feed_forward(rows, product):
            hidden = product(rows, weights["up"])
            hidden = activation(product(rows, weights["gate"])) * hidden if config.gated else activation(hidden)
            return product(hidden, weights["down"])

        bounded = experts.dispatch == "capacity" and not self.inference
        by_expert, computed = through_experts(
            flat,
            routing.chosen,
            flat_real,
            experts.count,
            feed_forward,
            capacity_factor=experts.capacity_factor if bounded else None,
        )
        y = jnp.sum(by_expert * routing.gates[..., None], axis=1).astype(x.dtype).reshape(x.shape)
        if experts.shared_d_ff:
            shared = FeedForward(config, experts.shared_d_ff, name="shared")(x)
            if experts.shared_gate:
                shared = shared * jax.nn.sigmoid(Linear(config, 1, "router", name="shared_gate")(x))
            y = y + shared
        num_dropped = jnp.sum(flat_real[:, None] & ~computed, dtype=jnp.float32)
        num_tokens = jnp.sum(flat_real, dtype=jnp.float32)
        dropped = num_dropped / jnp.maximum(num_tokens * experts.top_k, 1)
        return y, {**losses(routing, logits, flat_real), "dropped": dropped}

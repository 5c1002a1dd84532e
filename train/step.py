"""One training step and one evaluation step: pure functions, to be jitted, vmapped and sharded as one likes."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model import ModelConfig, Params
from model.layout import layer_kinds
from train.config import HParams, TrainConfig
from train.objective import EXPERT_METRICS, Batch, loss_and_metrics
from train.optimizer import clip_by_norm, make_optimizer
from train.schedule import learning_rate
from train.state import TrainState

Metrics = dict[str, Float[Array, ""]]
_METRICS = ("loss", "total_loss", "loss_tokens", "grad_norm", "param_norm", "learning_rate", "finite")


def metric_names(config: ModelConfig) -> tuple[str, ...]:
    """What `train_step` measures."""
    has_experts = any(kind.experts for kind in layer_kinds(config))
    return (*_METRICS, *EXPERT_METRICS) if has_experts else _METRICS


def train_step(
    config: ModelConfig, train_config: TrainConfig, state: TrainState, batch: Batch, hparams: HParams
) -> tuple[TrainState, Metrics]:
    """One update.

    metrics: loss, total_loss (nats per unmasked token), grad_norm (before clipping), param_norm (after the
    update), learning_rate, loss_tokens, finite, and EXPERT_METRICS of a mixture of experts. Where the loss, the
    gradient or the new parameters are not finite, `finite` is 0 and the state is handed back as it came: the last
    good one.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if train_config.dropout else None
    gradient = jax.value_and_grad(loss_and_metrics, argnums=1, has_aux=True)
    (_, metrics), grads = gradient(config, state.params, batch, hparams, key)
    grad_norm = optax.tree.norm(grads)
    rate = learning_rate(train_config.schedule, hparams, state.step)
    optimizer = make_optimizer(config, train_config, hparams)
    updates, optimizer_state = optimizer.update(
        clip_by_norm(grads, grad_norm, hparams.clip_norm), state.optimizer, state.params
    )
    params = jax.tree.map(lambda param, update: param - rate * update, state.params, updates)
    param_norm = optax.tree.norm(params)
    finite = jnp.isfinite(metrics["total_loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
    new = state.replace(step=state.step + 1, params=params, optimizer=optimizer_state)  # type: ignore[attr-defined]
    metrics |= {
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "learning_rate": rate,
        "finite": finite.astype(jnp.float32),
    }
    return keep_if(finite, new, state), metrics


def eval_step(config: ModelConfig, params: Params, batch: Batch) -> Metrics:
    """{"loss", "loss_tokens"} of one batch, without dropout; no expert drops a token."""
    if config.experts is not None:
        config = config.replace(experts=config.experts.replace(dispatch="dropless"))
    _, metrics = loss_and_metrics(config, params, batch)
    return {"loss": metrics["loss"], "loss_tokens": metrics["loss_tokens"]}


def keep_if(condition: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where the condition holds, else `old`, without touching a bit of it."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)

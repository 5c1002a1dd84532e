"""The loss: what is reported and what is differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model import ModelConfig, Params, forward
from train.config import HParams

Batch = dict[str, Any]
"""tokens and targets int32 [batch, seq]; optionally loss_mask, segment_ids, positions, token_types, all [batch, seq];
for an encoder-decoder encoder_tokens and optionally encoder_segment_ids [batch, source]."""
_INPUTS = ("positions", "segment_ids", "token_types", "encoder_tokens", "encoder_segment_ids")


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """(nats, log Z) per token, in float32."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def loss_and_metrics(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    hparams: HParams | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`total_loss` and {"loss", "total_loss", "loss_tokens"}, with experts also EXPERT_METRICS.

    loss: cross-entropy in nats, the mean over unmasked tokens. total_loss adds z_loss · mean(log Z)²
    (PaLM, section 5) and the losses of the experts' routers. key: dropout is on when given.
    """
    out = forward(
        config,
        params,
        batch["tokens"],
        **{name: batch[name] for name in _INPUTS if name in batch},
        dropout_rate=None if hparams is None else hparams.dropout_rate,
        dropout_key=key,
    )
    assert out.logits is not None
    nats, log_z = cross_entropy(out.logits, batch["targets"])
    mask = batch.get("loss_mask")
    mask = jnp.ones_like(nats) if mask is None else mask.astype(jnp.float32)
    count = jnp.sum(mask)
    mean = lambda values: jnp.sum(values * mask) / jnp.maximum(count, 1)
    loss = mean(nats)
    total = loss if hparams is None else loss + hparams.z_loss * mean(jnp.square(log_z))
    experts = _expert_metrics(out.auxiliary) if out.auxiliary else {}
    if experts and hparams is not None:
        total += hparams.balance_loss * experts["balance_loss"] + hparams.router_z_loss * experts["router_z_loss"]
    return total, {"loss": loss, "total_loss": total, "loss_tokens": count} | experts


EXPERT_METRICS = ("balance_loss", "router_z_loss", "expert_load_max", "expert_load_min", "expert_dropped")


def _expert_metrics(auxiliary: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """Losses and loads of the experts: load 1 is an even share, of the busiest and the idlest expert of all layers."""
    load = auxiliary["expert_use"] * auxiliary["expert_use"].shape[-1]
    values = (auxiliary["balance_loss"], auxiliary["router_z_loss"], load.max(), load.min(), auxiliary["dropped"])
    return dict(zip(EXPERT_METRICS, values, strict=True))

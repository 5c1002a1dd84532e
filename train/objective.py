"""The loss: what is reported and what is differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model import ModelConfig, Params, forward
from train.config import HParams

Batch = dict[str, Any]
"""tokens and targets int32 [batch, seq]; optionally loss_mask, segment_ids, positions, all [batch, seq]."""


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
    """`total_loss` and {"loss", "total_loss", "loss_tokens"}.

    loss: cross-entropy in nats, the mean over unmasked tokens. total_loss adds z_loss · mean(log Z)²
    (PaLM, section 5). key: dropout is on when given.
    """
    out = forward(
        config,
        params,
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
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
    return total, {"loss": loss, "total_loss": total, "loss_tokens": count}

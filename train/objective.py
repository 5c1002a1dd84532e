"""The loss: what is reported and what is differentiated, in sums that add up over the microbatches of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model import Execution, InputError, ModelConfig, Params, forward, head
from train.config import HParams

Batch = dict[str, Any]
"""tokens and targets int32 [batch, seq]; optionally loss_mask, segment_ids, positions, token_types, all [batch, seq];
for an encoder-decoder encoder_tokens and optionally encoder_segment_ids [batch, source]."""
_INPUTS = ("positions", "segment_ids", "token_types", "encoder_tokens", "encoder_segment_ids")
EXPERT_METRICS = ("balance_loss", "router_z_loss", "expert_load_max", "expert_load_min", "expert_dropped")


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """(nats, log Z) per token, in float32."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def count_tokens(batch: Batch) -> Float[Array, ""]:
    """Tokens that the loss is a mean over, at least 1."""
    mask = batch.get("loss_mask")
    size = float(batch["targets"].size)
    return jnp.float32(size) if mask is None else jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1)


def loss_and_sums(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    hparams: HParams | None = None,
    key: PRNGKeyArray | None = None,
    *,
    count: Float[Array, ""] | None = None,
    microbatches: int = 1,
    execution: Execution = Execution(),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return what one microbatch adds to `total_loss`, and to the sums that `finish` makes the metrics of.

    count: the tokens of the whole batch (None: of this one, which is then all of it); microbatches: how many it has.
    The sums over them are the whole batch's, but for the balance loss of experts, which is a mean of their own.
    key: dropout is on when given. Of `execution.loss_chunks` pieces of the sequence only one has its logits in memory.
    Raises InputError where they do not divide the sequence.
    """
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    rate = None if hparams is None else hparams.dropout_rate
    out = forward(
        config,
        params,
        batch["tokens"],
        **inputs,
        dropout_rate=rate,
        dropout_key=key,
        outputs=("final_hidden",),
        execution=execution,
    )
    count = count_tokens(batch) if count is None else count
    mask = batch.get("loss_mask")
    mask = None if mask is None else mask.astype(jnp.float32)
    chunks, wants_z = execution.loss_chunks, hparams is not None
    nats, z = _summed(config, params, out.final_hidden, batch["targets"], mask, wants_z, chunks)
    loss = nats / count
    total = loss if hparams is None else loss + hparams.z_loss * z / count
    experts = {name: value / microbatches for name, value in out.auxiliary.items()}
    if experts and hparams is not None:
        total += hparams.balance_loss * experts["balance_loss"] + hparams.router_z_loss * experts["router_z_loss"]
    tokens = jnp.float32(batch["targets"].size) if mask is None else jnp.sum(mask)
    return total, {"loss": loss, "total_loss": total, "loss_tokens": tokens} | experts


def finish(sums: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """Metrics of a whole batch: {"loss", "total_loss", "loss_tokens"}, with experts also EXPERT_METRICS.

    loss: cross-entropy in nats, the mean over unmasked tokens. total_loss adds z_loss · mean(log Z)² (PaLM, section 5)
    and the losses of the experts' routers. Loads: 1 is an even share, of the busiest and the idlest expert of all
    layers.
    """
    metrics = {name: sums[name] for name in ("loss", "total_loss", "loss_tokens")}
    if "expert_use" not in sums:
        return metrics
    load = sums["expert_use"] * sums["expert_use"].shape[-1]
    values = (sums["balance_loss"], sums["router_z_loss"], load.max(), load.min(), sums["dropped"])
    return metrics | dict(zip(EXPERT_METRICS, values, strict=True))


def _summed(config, params, hidden, targets, mask, wants_z, chunks) -> tuple[Array, Array]:
    """Σ nats and Σ (log Z)² over the unmasked tokens."""

    def sums(hidden, targets, mask):
        nats, log_z = cross_entropy(head(config, params, hidden), targets)
        weigh = lambda values: jnp.sum(values if mask is None else values * mask)
        return weigh(nats), weigh(jnp.square(log_z)) if wants_z else jnp.zeros((), jnp.float32)

    if chunks == 1:
        return sums(hidden, targets, mask)
    if hidden.shape[1] % chunks:
        raise InputError(f"loss_chunks={chunks} does not divide the batch's {hidden.shape[1]} tokens in a row")
    # Chunk k of n takes tokens k, k + n, …: as evenly spread over a sequence axis as the whole row.
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunks, *x.shape[2:]), 2, 0)
    parts = jax.tree.map(cut, (hidden, targets, mask))
    add = lambda total, part: (jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*part)), None)
    return jax.lax.scan(add, (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)), parts)[0]

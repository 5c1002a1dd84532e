"""Objectives that predict tokens of text: cross-entropy at the positions that a mask names, over rows of a corpus."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from model import Execution, InputError, ModelConfig, Params, forward, head
from model.layout import layer_kinds
from model.transformer import Output
from train.config import HParams, TrainConfig
from train.data.loader import validation_batches
from train.data.manifest import Manifest
from train.data.mixture import PhasedLoader
from train.data.noise import Noise
from train.data.rows import rows_of
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec, Metrics, Objective
from train.plan import Plan

_INPUTS = ("positions", "segment_ids", "token_types", "encoder_tokens", "encoder_segment_ids")
EXPERT_METRICS = ("balance_loss", "router_z_loss", "expert_load_max", "expert_load_min", "expert_dropped")
_VALIDATION_SEED = 0  # of what is drawn for validation: the same for every run


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """Predict `targets` where `loss_mask` is 1, from what `corrupt` leaves of the rows of a corpus.

    A batch has tokens and targets int32 [batch, seq]; optionally loss_mask, segment_ids, positions, token_types, all
    [batch, seq]; for an encoder-decoder encoder_tokens and optionally encoder_segment_ids [batch, source].
    """

    UNIT: ClassVar[str] = "nats per predicted token"

    def corrupt(
        self, config: ModelConfig, batch: Batch, noise: Noise, manifest: Manifest, hparams: HParams | None
    ) -> Batch:
        """Return what the model is to see and to predict of rows of text, on the host; here all, as it stands.

        batch: as `train.data.rows` draws it: each of its `tokens` with the one after it as target. noise: random
        numbers for every one of its positions. hparams None: for validation.
        """
        del config, noise, manifest, hparams
        return batch

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return tokens and targets, and what tells documents apart where the run does."""
        del config
        shape = (batch_size, seq_len)
        dtypes: dict[str, Any] = {"tokens": np.int32, "targets": np.int32}
        if train_config.tells_documents_apart:
            dtypes |= {"segment_ids": np.int32, "positions": np.int32, "loss_mask": np.float32}
        if evaluation:
            dtypes["loss_mask"] = np.float32
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}

    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return rows in an order from the seed, each document or window once per epoch."""
        manifest = next(iter(sources.values())).manifest
        corrupt = functools.partial(self.corrupt, config, manifest=manifest, hparams=hparams)
        return PhasedLoader(sources, plan, seed=hparams.order_seed, rows=rows_of(train_config), transform=corrupt)

    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the first tokens of the validation split, in order; what is drawn for each is fixed by its place."""
        shards = TokenShards(folder, "validation")
        batches = validation_batches(
            shards,
            batch_size=train_config.batch_size,
            seq_len=train_config.seq_len,
            max_tokens=max_tokens,
            segment_documents=train_config.tells_documents_apart,
        )
        rows = np.arange(train_config.batch_size, dtype=np.int64)
        made = []
        for number, batch in enumerate(batches):
            noise = Noise.of_rows(_VALIDATION_SEED, number * train_config.batch_size + rows, train_config.seq_len)
            made.append(self.corrupt(config, batch, noise, shards.manifest, None))
        if not any(batch["loss_mask"].any() for batch in made):
            raise InputError(
                f"nothing to predict in the first {max_tokens} tokens of the validation split of {shards.folder}; "
                f"validate on more, such as evaluate_tokens={train_config.tokens_per_step}"
            )
        return made

    def context_free_nats(
        self, config: ModelConfig, batch: Batch, manifest: Manifest, frequencies: Float64[np.ndarray, " vocab"]
    ) -> Float64[np.ndarray, "batch seq"]:
        """Return the least nats of each target for who knows the targets' frequencies but sees no other position.

        Here those of a unigram model: what stands at a position says nothing of its target.
        """
        del config, manifest
        return -np.log(frequencies[batch["targets"]])

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Return the tokens that the loss is a mean over, at least 1."""
        mask = batch.get("loss_mask")
        size = float(batch["targets"].size)
        return jnp.float32(size) if mask is None else jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1)

    def run(
        self,
        config: ModelConfig,
        params: Params,
        batch: Batch,
        hparams: HParams | None,
        key: PRNGKeyArray | None,
        *,
        outputs: tuple[str, ...] = (),
        execution: Execution = Execution(),
    ) -> Output:
        """Return what the model makes of a batch; params: all of them (`merged`). key: dropout is on when given."""
        return forward(
            config,
            params,
            batch["tokens"],
            **{name: batch[name] for name in _INPUTS if name in batch},
            dropout_rate=None if hparams is None else hparams.dropout_rate,
            dropout_key=key,
            outputs=outputs,
            execution=execution,
        )

    def loss(
        self,
        config: ModelConfig,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        hparams: HParams | None = None,
        key: PRNGKeyArray | None = None,
        *,
        count: Float[Array, ""] | None = None,
        microbatches: int = 1,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return (total loss, sums), as `Objective.loss` says.

        The sums over microbatches are the whole batch's, but for the balance loss of experts, which is a mean of their
        own. Of `execution.loss_chunks` pieces of the sequence only one has its logits in memory. Raises InputError
        where they do not divide the sequence.
        """
        params = self.merged(params, frozen, hparams)
        out = self.run(config, params, batch, hparams, key, outputs=("final_hidden",), execution=execution)
        count = self.count(batch) if count is None else count
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

    def finish(self, sums: dict[str, Array]) -> Metrics:
        """Return {"loss", "total_loss", "loss_tokens"}, with experts also EXPERT_METRICS.

        loss: cross-entropy in nats, the mean over unmasked tokens. total_loss adds z_loss · mean(log Z)² (PaLM,
        section 5) and the losses of the experts' routers. Loads: 1 is an even share, of the busiest and the idlest
        expert of all layers.
        """
        metrics = {name: sums[name] for name in ("loss", "total_loss", "loss_tokens")}
        if "expert_use" not in sums:
            return metrics
        load = sums["expert_use"] * sums["expert_use"].shape[-1]
        values = (sums["balance_loss"], sums["router_z_loss"], load.max(), load.min(), sums["dropped"])
        return metrics | dict(zip(EXPERT_METRICS, values, strict=True))

    def metric_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Return those of `finish`."""
        experts = EXPERT_METRICS if any(kind.experts for kind in layer_kinds(config)) else ()
        return ("loss", "total_loss", "loss_tokens", *experts)


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """Return (nats, log Z) per token, in float32."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


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

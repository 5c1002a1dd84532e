"""Objectives that predict tokens of text: cross-entropy at the unmasked positions of rows of a corpus."""

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
_VALIDATION_SEED = 0  # of the noise in validation batches: the same for every run


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """Prediction of `targets` where `loss_mask` is 1, from rows of a corpus that `corrupt` may change.

    A batch has tokens and targets, int32 [batch, seq], and optionally loss_mask, segment_ids, positions and
    token_types, all [batch, seq]; for an encoder-decoder also encoder_tokens and optionally encoder_segment_ids,
    [batch, source].
    """

    UNIT: ClassVar[str] = "nats per predicted token"

    def corrupt(
        self, config: ModelConfig, batch: Batch, noise: Noise, manifest: Manifest, hparams: HParams | None
    ) -> Batch:
        """Return inputs and targets for rows of text, on the host; here the batch, unchanged.

        batch: rows from `train.data.rows`, with the next token as target. noise: random numbers for each position.
        hparams: None for validation.
        """
        del config, noise, manifest, hparams
        return batch

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return tokens and targets, and for separate documents also their segment ids, positions and loss mask."""
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
        """Return a loader of shuffled rows, each document or window once per epoch."""
        manifest = next(iter(sources.values())).manifest
        corrupt = functools.partial(self.corrupt, config, manifest=manifest, hparams=hparams)
        return PhasedLoader(sources, plan, seed=hparams.order_seed, rows=rows_of(train_config), transform=corrupt)

    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the first tokens of the validation split, in order; the noise of each position is fixed."""
        shards = TokenShards(folder, "validation")
        batches = validation_batches(
            shards,
            batch_size=train_config.batch_size,
            seq_len=train_config.seq_len,
            max_tokens=max_tokens,
            segment_documents=train_config.tells_documents_apart,
        )
        corrupted = []
        for number, batch in enumerate(batches):
            rows = number * train_config.batch_size + np.arange(train_config.batch_size, dtype=np.int64)
            noise = Noise.of_rows(_VALIDATION_SEED, rows, train_config.seq_len)
            corrupted.append(self.corrupt(config, batch, noise, shards.manifest, None))
        if not any(batch["loss_mask"].any() for batch in corrupted):
            raise InputError(
                f"nothing to predict in the first {max_tokens} tokens of the validation split of {shards.folder}; "
                f"validate on more, such as evaluate_tokens={train_config.tokens_per_step}"
            )
        return corrupted

    def context_free_nats(
        self, config: ModelConfig, batch: Batch, manifest: Manifest, frequencies: Float64[np.ndarray, " vocab"]
    ) -> Float64[np.ndarray, "batch seq"]:
        """Return the nats of each target under the best prediction that uses no other position of the row.

        frequencies: of the targets, summing to 1. Here the prediction is a unigram model: the token at a position says
        nothing about its target.
        """
        del config, manifest
        return -np.log(frequencies[batch["targets"]])

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Return the number of unmasked tokens, at least 1."""
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
        """Apply the model to a batch. params: all parameters (see `merged`); key: turns dropout on."""
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
        """Return (total loss, sums); see `Objective.loss`.

        Summed over microbatches they equal those of the whole batch, except for the balance loss of experts, which is
        the mean over microbatches. With `execution.loss_chunks` > 1 only one chunk of the sequence has its logits in
        memory at a time. Raises InputError if loss_chunks does not divide the sequence.
        """
        params = self.merged(params, frozen, hparams)
        out = self.run(config, params, batch, hparams, key, outputs=("final_hidden",), execution=execution)
        count = self.count(batch) if count is None else count
        mask = batch.get("loss_mask")
        mask = None if mask is None else mask.astype(jnp.float32)
        assert out.final_hidden is not None
        nats, squared_log_z = _loss_sums(
            config,
            params,
            out.final_hidden,
            batch["targets"],
            mask,
            with_z_loss=hparams is not None,
            chunks=execution.loss_chunks,
        )
        loss = nats / count
        total = loss if hparams is None else loss + hparams.z_loss * squared_log_z / count
        experts = {name: value / microbatches for name, value in out.auxiliary.items()}
        if experts and hparams is not None:
            total += hparams.balance_loss * experts["balance_loss"] + hparams.router_z_loss * experts["router_z_loss"]
        tokens = jnp.float32(batch["targets"].size) if mask is None else jnp.sum(mask)
        return total, {"loss": loss, "total_loss": total, "loss_tokens": tokens} | experts

    def finish(self, sums: dict[str, Array]) -> Metrics:
        """Return {"loss", "total_loss", "loss_tokens"}, for models with experts also EXPERT_METRICS.

        loss: mean cross-entropy of the unmasked tokens, in nats. total_loss adds z_loss · mean((log Z)²) (PaLM, section
        5) and the auxiliary losses of the experts' routers. expert_load_max and expert_load_min: load of the busiest
        and the least busy expert of all layers, where 1 is an equal share.
        """
        metrics = {name: sums[name] for name in ("loss", "total_loss", "loss_tokens")}
        if "expert_use" not in sums:
            return metrics
        load = sums["expert_use"] * sums["expert_use"].shape[-1]
        values = (sums["balance_loss"], sums["router_z_loss"], load.max(), load.min(), sums["dropped"])
        return metrics | dict(zip(EXPERT_METRICS, values, strict=True))

    def metric_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the names of the metrics that `finish` returns."""
        experts = EXPERT_METRICS if any(kind.experts for kind in layer_kinds(config)) else ()
        return ("loss", "total_loss", "loss_tokens", *experts)


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], targets: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """Return (nats, log Z) per token; log Z is the logarithm of the softmax's denominator."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def _loss_sums(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "batch seq d_model"],
    targets: Int[Array, "batch seq"],
    mask: Float[Array, "batch seq"] | None,
    *,
    with_z_loss: bool,
    chunks: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (Σ nats, Σ (log Z)²) over the unmasked tokens; the second sum is 0 unless with_z_loss.

    With several chunks the logits of one chunk are in memory at a time, and are recomputed in the backward pass.
    """

    def sums(hidden: Array, targets: Array, mask: Array | None) -> tuple[Array, Array]:
        def masked_sum(values: Array) -> Array:
            return jnp.sum(values if mask is None else values * mask)

        nats, log_z = cross_entropy(head(config, params, hidden), targets)
        return masked_sum(nats), masked_sum(jnp.square(log_z)) if with_z_loss else jnp.zeros((), jnp.float32)

    if chunks == 1:
        return sums(hidden, targets, mask)
    if hidden.shape[1] % chunks:
        raise InputError(f"loss_chunks={chunks} does not divide the batch's {hidden.shape[1]} tokens in a row")

    def split(x: Array) -> Array:
        # [batch, seq, …] → [chunks, batch, seq / chunks, …]. With 2 chunks, tokens 0, 2, 4, … and 1, 3, 5, …: each
        # chunk is then spread over all devices of a sharded sequence axis.
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunks, *x.shape[2:]), 2, 0)

    def add_chunk(totals: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        return jax.tree.map(jnp.add, totals, jax.checkpoint(sums)(*chunk)), None

    zeros = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    totals, _ = jax.lax.scan(add_chunk, zeros, jax.tree.map(split, (hidden, targets, mask)))
    return totals

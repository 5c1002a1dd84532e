"""Classification of labelled text, from an encoder's first token or a decoder's last one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from model import Execution, InputError, ModelConfig, Params, forward
from train.config import HParams, TrainConfig
from train.data.labelled import LabelledDocuments, classes_of, labelled_validation
from train.data.manifest import Manifest
from train.data.mixture import PhasedLoader
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec, Metrics, Objective
from train.plan import Plan


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy of one label per document; documents longer than a row are truncated."""

    NAME: ClassVar[str] = "classification"
    UNIT: ClassVar[str] = "nats per document"
    WEIGHT: ClassVar[str] = "loss_rows"
    EVALUATED: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def fit(self, config: ModelConfig, manifest: Manifest | None = None) -> tuple[ModelConfig, Self]:
        """Return the model with a classifier head for the classes of the data, for encoders with BERT's pooler."""
        if config.head != "classifier":
            is_encoder = config.stack == "encoder"
            config = config.replace(head="classifier", head_bias=is_encoder, pooler=is_encoder)
        if manifest is not None and manifest.labels:
            config = config.replace(num_labels=len(manifest.labels))
        return config, self

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError for a model without a classifier head, an encoder-decoder, or too short a context."""
        if config.head != "classifier" or config.stack == "encoder-decoder":
            raise InputError(
                f"objective='classification' trains encoders and decoders with head='classifier', not "
                f"stack={config.stack!r} with head={config.head!r}; set head=classifier and one of these stacks"
            )
        if train_config.tells_documents_apart:
            raise InputError(
                "objective='classification' reads one document per row; leave packing and segment_documents at their "
                "defaults"
            )
        super().check(config, train_config)

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError for data without labels, or with more classes than the model."""
        super().check_data(config, sources)
        for name, source in sources.items():
            classes = classes_of(source)
            if len(classes) > config.num_labels:
                raise InputError(
                    f"{name} has {len(classes)} classes and the model num_labels={config.num_labels}; "
                    f"set num_labels={len(classes)}"
                )

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return tokens of one document per row, segment ids (0 for padding) and labels."""
        del config, train_config
        row = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32)
        spec = {"tokens": row, "segment_ids": row, "labels": jax.ShapeDtypeStruct((batch_size,), np.int32)}
        if evaluation:
            spec["loss_mask"] = jax.ShapeDtypeStruct((batch_size,), np.float32)
        return spec

    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return batches of labelled documents, each document once per epoch, shuffled by the seed."""
        del config, train_config
        return PhasedLoader(sources, plan, seed=hparams.order_seed, rows=LabelledDocuments)

    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the first documents of the validation split, at most `max_tokens` tokens of them."""
        del config
        return labelled_validation(folder, train_config.batch_size, train_config.seq_len, max_tokens)

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Return the number of rows without padding rows, at least 1."""
        mask = batch.get("loss_mask")
        return jnp.float32(batch["labels"].size) if mask is None else jnp.maximum(jnp.sum(mask), 1)

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
        """Return (total loss, {"loss", "total_loss", "accuracy", "loss_rows"})."""
        out = forward(
            config,
            self.merged(params, frozen, hparams),
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            dropout_rate=None if hparams is None else hparams.dropout_rate,
            dropout_key=key,
            execution=execution,
        )
        assert out.logits is not None
        labels = batch["labels"]
        mask = batch["loss_mask"].astype(jnp.float32) if "loss_mask" in batch else jnp.ones(labels.shape, jnp.float32)
        count = self.count(batch) if count is None else count
        nats = -jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], axis=-1)[:, 0]
        correct = (jnp.argmax(out.logits, axis=-1) == labels).astype(jnp.float32)

        def mean(values: Float[Array, " batch"]) -> Float[Array, ""]:
            # Padding rows have no token to attend to, so their values may be NaN.
            return jnp.sum(jnp.where(mask > 0, values * mask, 0)) / count

        loss, accuracy = mean(nats), mean(correct)
        total = loss
        if out.auxiliary and hparams is not None:
            balance = hparams.balance_loss * out.auxiliary["balance_loss"]
            total += (balance + hparams.router_z_loss * out.auxiliary["router_z_loss"]) / microbatches
        return total, {"loss": loss, "total_loss": total, "accuracy": accuracy, "loss_rows": jnp.sum(mask)}

    def finish(self, sums: dict[str, Array]) -> Metrics:
        """Return loss (nats), accuracy (fraction of labels predicted), total_loss and loss_rows."""
        return sums

    def metric_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the names of the metrics that `finish` returns."""
        return (*super().metric_names(config), "accuracy")

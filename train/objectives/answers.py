"""Base class of losses over whole answers to prompts: examples of two rows, weights, data folders, FLOPs."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from model import Execution, InputError, ModelConfig, Params, accounting
from model.products import ALL, flops_by_product
from train.config import HParams, TrainConfig
from train.data.examples.batches import validation_examples
from train.data.kinds import check_kind
from train.data.mixture import PhasedLoader
from train.data.noise import Noise
from train.data.rows import Rows
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec, Metrics, Objective
from train.plan import Plan


@dataclasses.dataclass(frozen=True)
class AnswerObjective(Objective):
    """A loss over examples of two rows of `seq_len` tokens each; a loss may only read the second row.

    The arrays of the two rows have the prefixes SIDES: `tokens` int32 [examples, seq], `mask` float32 [examples, seq],
    1 for tokens of the answer, and optionally `segment_ids` int32 (0: padding). `weights` float32 [examples], optional,
    weigh the examples. KIND: kind of the data folders (`isoflop data prepare --kind`).
    """

    WEIGHT: ClassVar[str] = "loss_examples"
    KIND: ClassVar[str]
    SIDES: ClassVar[tuple[str, str]]

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError on a model that is no decoder, on rows of text, or on rows beyond the model's context."""
        if config.stack != "decoder":
            raise InputError(f"objective={self.NAME!r} trains decoders, not stack={config.stack!r}")
        if train_config.tells_documents_apart:
            raise InputError(
                f"objective={self.NAME!r} reads one answer a row; leave packing and segment_documents at their defaults"
            )
        super().check(config, train_config)

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError on data of another kind."""
        super().check_data(config, sources)
        for source in sources.values():
            check_kind(source, self.KIND)

    def check_execution(self, train_config: TrainConfig, execution: Execution) -> None:
        """Raise InputError on microbatches of a loss that depends on its whole batch."""
        if not self.separable and execution.accumulate > 1:
            raise InputError(
                f"this loss compares the answers of a whole batch, which accumulate={execution.accumulate} would "
                "divide; leave accumulate at 1"
            )
        super().check_execution(train_config, execution)

    def check_hparams(self, hparams: HParams) -> None:
        """Raise InputError on hyperparameters that make the loss undefined or train nothing."""

    # ---- batches

    @abstractmethod
    def rows(self, shards: TokenShards, seq_len: int) -> Rows:
        """Return the examples of a split."""

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the arrays of both sides, and the weights of the examples."""
        del config, train_config, evaluation
        ids = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32)
        mask = jax.ShapeDtypeStruct((batch_size, seq_len), np.float32)
        spec: BatchSpec = {"weights": jax.ShapeDtypeStruct((batch_size,), np.float32)}
        for side in self.SIDES:
            spec |= {f"{side}tokens": ids, f"{side}mask": mask, f"{side}segment_ids": ids}
        return spec

    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return the examples of the training split, each once per epoch, in an order from the seed."""
        self.check_hparams(hparams)
        names = tuple(self.batch_spec(config, train_config, 1, 1))

        def chosen(batch: Batch, noise: Noise) -> Batch:
            del noise
            return {name: batch[name] for name in names}

        return PhasedLoader(sources, plan, seed=hparams.order_seed, rows=self.rows, transform=chosen)

    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the first examples of the validation split, as many as have `max_tokens` tokens."""
        rows = self.rows(TokenShards(folder, "validation"), train_config.seq_len)
        names = self.batch_spec(config, train_config, 1, 1, evaluation=True)
        batches = validation_examples(rows, train_config.batch_size, max_tokens)
        return [{name: batch[name] for name in names} for batch in batches]

    # ---- the loss

    def count(self, batch: Batch) -> Any:
        """Return the weight of all examples."""
        return jnp.sum(self.weights(batch))

    def weights(self, batch: Batch) -> Float[Array, " examples"]:
        """Return the weight of every example, 1 where the batch has none."""
        examples = batch[f"{self.SIDES[0]}tokens"].shape[0]
        return jnp.asarray(batch.get("weights", jnp.ones(examples)), jnp.float32)

    def both(self, batch: Batch, name: str) -> Any:
        """Return an array of both rows [2 · examples, …], None if the batch does not have it.

        The two rows of an example are adjacent, so that they stay on one device of a mesh that splits the batch.
        """
        first, second = (batch.get(f"{side}{name}") for side in self.SIDES)
        if first is None or second is None:
            return None
        stacked = jnp.stack([first, second], axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    def evaluate(
        self,
        config: ModelConfig,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        *,
        hparams: HParams | None = None,
        execution: Execution = Execution(),
    ) -> Metrics:
        """Return the means EVALUATED of one batch and WEIGHT, with these hyperparameters, such as β.

        The reference is that of training.
        """
        _, sums = self.loss(config, params, frozen, batch, hparams, execution=execution)
        return {name: sums[name] for name in (*self.EVALUATED, self.WEIGHT)}

    def metric_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Return those of `finish`."""
        means = (name for name in self.EVALUATED if name != "loss")
        return (*super().metric_names(config), *means)

    # ---- accounting

    def rows_read(self) -> tuple[int, int, int]:
        """Return the rows of an example that are trained on, read by the policy alone, and read by the reference."""
        return 2, 0, 0

    def training_flops_by_product(self, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Return the exact FLOPs of training one example, over the `seq_len` tokens of one row, by product."""
        trained, by_policy, by_reference = self.rows_read()
        total = {name: trained * flops for name, flops in super().training_flops_by_product(config, seq_len).items()}
        for rows, name, selection in ((by_policy, "policy alone", self.selection), (by_reference, "reference", ALL)):
            if rows:
                total[name] = rows * sum(flops_by_product(config, seq_len, None, selection).forward.values())
        return total

    def flops_per_token(self, config: ModelConfig, seq_len: int, convention: accounting.Convention = "exact") -> float:
        """Return the FLOPs of training one example, over the `seq_len` tokens of one row.

        "6N": 6 for each parameter and token of rows that are trained on, 2 for each of rows that are only read.
        """
        once = super().flops_per_token(config, seq_len, convention)
        trained, *read = self.rows_read()
        return once if convention == "exact" else once * (trained + sum(read) / 3)


def weighted_mean(
    values: Float[Array, " examples"], weights: Float[Array, " examples"], count: Float[Array, ""]
) -> Float[Array, ""]:
    """Return Σ weight · value / count; examples of weight 0, which may be all padding, are left out."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0)) / count


def balance_loss(
    auxiliary: Mapping[str, Array], hparams: HParams | None, microbatches: int
) -> Float[Array, ""] | float:
    """Return what a microbatch adds to the total loss for its experts; 0 in an evaluation and without experts."""
    if not auxiliary or hparams is None:
        return 0.0
    balance = hparams.balance_loss * auxiliary["balance_loss"] + hparams.router_z_loss * auxiliary["router_z_loss"]
    return balance / microbatches

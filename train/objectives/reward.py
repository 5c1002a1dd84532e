"""Reward models: a number for every answer, higher for the one that people chose (Bradley and Terry 1952)."""

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from model import Execution, InputError, ModelConfig, Params, forward, head
from train.config import HParams, TrainConfig
from train.data.examples.batches import PairRows
from train.data.manifest import Manifest
from train.data.rows import Rows
from train.data.shards import TokenShards
from train.objectives.answers import AnswerObjective, balance_loss, weighted_mean
from train.objectives.objective import Batch, BatchSpec

_MEANS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@dataclasses.dataclass(frozen=True)
class Reward(AnswerObjective):
    """−log σ(r(chosen) − r(rejected) − margin) of pairs (Ouyang et al. 2022); r is the scalar head at the last token.

    Batches are those of `Preference`. margins: whether the data say by how much an answer is better, as margins float32
    [pairs] (Touvron et al. 2023, Llama 2). The hyperparameter `center_weight` adds (r(chosen) + r(rejected))²: only
    differences of rewards are learned, and their level would drift (Eisenstein et al. 2023). The last token is that of
    the row's segment, or of its mask where it has no segment: never the first padding token, whatever its id.
    """

    NAME: ClassVar[str] = "reward"
    UNIT: ClassVar[str] = "nats per pair"
    KIND: ClassVar[str] = "preference"
    SIDES: ClassVar[tuple[str, str]] = ("chosen_", "rejected_")
    EVALUATED: ClassVar[tuple[str, ...]] = ("loss", *_MEANS)
    HIGHER_IS_BETTER: ClassVar[tuple[str, ...]] = ("accuracy", "margin")
    FRESH: ClassVar[tuple[str, ...]] = ("head",)

    margins: bool = False

    def fit(self, config: ModelConfig, manifest: Manifest | None = None) -> tuple[ModelConfig, Self]:
        """Return the model with a scalar head, and the objective with the margins that the data have."""
        margins = self.margins or (manifest is not None and _has_margins(manifest))
        return config.replace(head="scalar"), self.replace(margins=margins)

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError on a model without a scalar head."""
        if config.head != "scalar":
            raise InputError(f"objective='reward' trains models with head='scalar', not head={config.head!r}")
        super().check(config, train_config)

    def rows(self, shards: TokenShards, seq_len: int) -> Rows:
        """Return the pairs of a split."""
        return PairRows(shards, seq_len)

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the arrays of both answers, the weights of the pairs, and their margins."""
        spec = super().batch_spec(config, train_config, batch_size, seq_len, evaluation=evaluation)
        return spec | ({"margins": spec["weights"]} if self.margins else {})

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
        """Return (total loss, sums), as `Objective.loss` says; means over pairs are weighted."""
        count = self.count(batch) if count is None else count
        params = self.merged(params, frozen, hparams)
        out = forward(
            config,
            params,
            self.both(batch, "tokens"),
            segment_ids=self.both(batch, "segment_ids"),
            dropout_rate=None if hparams is None or key is None else hparams.dropout_rate,
            dropout_key=key,
            outputs=("final_hidden",),
            execution=execution,
        )
        assert out.final_hidden is not None
        values = head(config, params, out.final_hidden)
        segments = self.both(batch, "segment_ids")
        real = self.both(batch, "mask") > 0 if segments is None else segments > 0
        last = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
        rewards = jnp.take_along_axis(values, last[:, None], axis=1).reshape(-1, 2)
        chosen, rejected, weights = rewards[:, 0], rewards[:, 1], self.weights(batch)
        mean = functools.partial(weighted_mean, weights=weights, count=count)
        loss = mean(-jax.nn.log_sigmoid(chosen - rejected - batch.get("margins", 0.0)))
        center = 0.0 if hparams is None else hparams.center_weight * mean(jnp.square(chosen + rejected))
        means = ((chosen > rejected).astype(jnp.float32), chosen - rejected, chosen, rejected)
        total = loss + center + balance_loss(out.auxiliary, hparams, microbatches)
        sums = {"loss": loss, "total_loss": total, self.WEIGHT: jnp.sum(weights)}
        return total, sums | {name: mean(value) for name, value in zip(_MEANS, means, strict=True)}


def _has_margins(manifest: Manifest) -> bool:
    return any(file.name.startswith("margins-") for files in manifest.array_files.values() for file in files)

"""Preference alignment: train on pairs of a chosen and a rejected answer, or on rated answers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model import Execution, InputError, ModelConfig, Params, forward
from model.errors import UnknownNameError
from train.config import HParams, TrainConfig
from train.data.examples.batches import PairRows, RatedRows
from train.data.examples.formats import TWO_PROMPTS
from train.data.mixture import PhasedLoader
from train.data.rows import Rows
from train.data.shards import TokenShards
from train.objectives.answers import AnswerObjective, balance_loss, weighted_mean
from train.objectives.log_probs import summed_log_probs
from train.objectives.objective import Batch, BatchSpec
from train.objectives.preference_losses import (
    DIVERGING,
    LOSSES,
    OF_WHOLE_BATCHES,
    REFERENCE_FREE,
    SORTED,
    Divergence,
    PairLogProbs,
    Weighting,
    rated_kto,
)
from train.plan import Plan
from train.reference import read_reference, read_reference_tails

_MEANS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob")


@dataclasses.dataclass(frozen=True)
class ReferencedObjective(AnswerObjective):
    """A loss on log-probabilities of answers relative to those of a reference model.

    reference: name of reference log-probabilities kept with the data (`train.reference`); None: they are computed in
    each step, by the frozen base of an adapter or by a whole model passed as `frozen`.
    """

    UNIT: ClassVar[str] = "per example"
    EVALUATED: ClassVar[tuple[str, ...]] = ("loss", *_MEANS)
    HIGHER_IS_BETTER: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "chosen_reward", "chosen_log_prob")

    reference: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference is not None and not isinstance(self.reference, str):
            raise InputError(f"reference={self.reference!r} must be the name of reference log-probabilities")

    @property
    def compares(self) -> bool:
        """Return whether the loss reads a reference at all."""
        return True

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError if the model generates no text, or if there is no reference."""
        if config.head != "language-model":
            raise InputError(f"objective={self.NAME!r} trains language models, not head={config.head!r}")
        if self.compares and self.reference is None and self.adapter is None:
            raise InputError(
                f"objective={self.NAME!r} compares with a reference model: keep its log-probabilities with the data "
                "(train.reference.keep_reference, which `isoflop tune` calls), or train an adapter"
            )
        super().check(config, train_config)

    def check_hparams(self, hparams: HParams) -> None:
        """Raise InputError where β is 0."""
        if float(hparams.beta) == 0:
            raise InputError("beta=0 must be above 0: with 0 no preference changes the model")

    def kept_reference(self, shards: TokenShards) -> Float[np.ndarray, " documents"] | None:
        """Return the log-probabilities that the reference gives a split's documents; None where none are kept."""
        return read_reference(shards, self.reference) if self.compares and self.reference is not None else None

    def rows_read(self) -> tuple[int, int, int]:
        """Return the rows of an example that are trained on, read by the policy alone, and read by the reference."""
        return 2, 0, 2 if self.compares and self.reference is None else 0

    def models(self, params: Params, frozen: Params | None, hparams: HParams | None) -> tuple[Params, Params | None]:
        """Return the parameters of the policy, and those of the reference, where they are given."""
        if self.freezes:
            return self.merged(params, frozen, hparams), frozen if self.adapter is not None else None
        return params, frozen or None

    def log_probs(
        self,
        config: ModelConfig,
        params: Params,
        rows: tuple[Int[Array, "rows seq"], Int[Array, "rows seq"] | None],
        masks: Float[Array, "masks rows seq"],
        hparams: HParams | None = None,
        key: PRNGKeyArray | None = None,
        execution: Execution = Execution(),
        squares: Float[Array, "squares rows seq"] | None = None,
    ) -> tuple[Float[Array, "sums rows"], Mapping[str, Array]]:
        """Return the summed log-probabilities of rows (tokens, segment ids), and the reports of experts.

        squares: see `summed_log_probs`.
        """
        tokens, segment_ids = rows
        out = forward(
            config,
            params,
            tokens,
            segment_ids=segment_ids,
            dropout_rate=None if hparams is None or key is None else hparams.dropout_rate,
            dropout_key=key,
            outputs=("final_hidden",),
            execution=execution,
        )
        assert out.final_hidden is not None
        found = summed_log_probs(config, params, out.final_hidden, tokens, masks, execution.loss_chunks, squares)
        return found, out.auxiliary

    def reference_log_probs(
        self,
        config: ModelConfig,
        reference: Params | None,
        rows: tuple[Int[Array, "rows seq"], Int[Array, "rows seq"] | None],
        mask: Float[Array, "rows seq"],
        execution: Execution,
    ) -> Float[Array, " rows"]:
        """Return the reference's summed log-probabilities. Raises InputError where its parameters are not given."""
        if reference is None:
            raise InputError(
                f"objective={self.NAME!r} compares with a reference model: give reference log-probabilities in the "
                "batch, or the reference's parameters as frozen"
            )
        found, _ = self.log_probs(config, jax.lax.stop_gradient(reference), rows, mask[None], execution=execution)
        return found[0]


@dataclasses.dataclass(frozen=True)
class Preference(ReferencedObjective):
    """A loss of `train.objectives.preference_losses` over pairs of answers, a chosen and a rejected one.

    kind: the loss, by name. divergence: what keeps the policy near its reference, where the loss leaves a choice.
    weighting: "wpo" weighs the loss of each pair by how likely the policy itself is to write its answers
    (`_agreement`). β and the other numbers of a loss are hyperparameters, and so lanes of one program.

    A batch has chosen_tokens, rejected_tokens int32 [pairs, seq]; chosen_mask, rejected_mask, 1 where the token is of
    the answer; optionally chosen_segment_ids, rejected_segment_ids (0: padding), weights float32 [pairs], and
    reference_chosen, reference_rejected float32 [pairs], the answers' summed log-probabilities. For an `ld_alpha` below
    1, reference_chosen_tail and reference_rejected_tail are the parts of these sums that it weighs.
    """

    NAME: ClassVar[str] = "preference"
    KIND: ClassVar[str] = "preference"
    SIDES: ClassVar[tuple[str, str]] = ("chosen_", "rejected_")

    kind: str = "dpo"
    divergence: Divergence = "reverse_kl"
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in LOSSES:
            raise UnknownNameError("preference loss", str(self.kind), LOSSES)
        if self.divergence not in get_args(Divergence):
            raise UnknownNameError("divergence", str(self.divergence), get_args(Divergence))
        if self.divergence != "reverse_kl" and self.kind not in DIVERGING:
            raise InputError(
                f"kind={self.kind!r} is defined for divergence='reverse_kl' alone; {self.divergence!r} is for "
                f"{', '.join(DIVERGING)}"
            )
        if self.weighting not in get_args(Weighting):
            raise UnknownNameError("weighting", str(self.weighting), get_args(Weighting))
        if self.weighting != "none" and self.kind in SORTED:
            raise InputError(
                f"kind={self.kind!r} compares answers in sorted order, so that no pair has a weight; leave weighting "
                "at 'none'"
            )

    @property
    def compares(self) -> bool:
        """Return whether the loss reads a reference at all."""
        return self.kind not in REFERENCE_FREE

    @property
    def separable(self) -> bool:
        """Return whether microbatches add up to the loss of their batch."""
        return self.kind not in OF_WHOLE_BATCHES

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError on data of another kind, and on pairs whose prompts differ."""
        super().check_data(config, sources)
        for source in sources.values():
            if count := source.manifest.altered.get(TWO_PROMPTS):
                raise InputError(
                    f"{source.folder} has {count} {TWO_PROMPTS}, which a reward model can compare but "
                    f"kind={self.kind!r} cannot: leave them out, or train a reward model"
                )

    def check_hparams(self, hparams: HParams) -> None:
        """Raise InputError on a label smoothing with which the loss is no number, and where β is 0."""
        super().check_hparams(hparams)
        smoothing = float(hparams.label_smoothing)
        if self.kind == "robust" and smoothing >= 0.5:
            raise InputError(f"label_smoothing={smoothing:g} must be below 0.5 for kind='robust'")
        if self.kind == "exo_pair" and smoothing == 0:
            raise InputError("kind='exo_pair' needs a label_smoothing above 0, such as 0.001")

    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return the pairs of the training split; see `AnswerObjective.source`.

        Raises InputError if `ld_alpha` weighs parts of reference log-probabilities that are not kept.
        """
        if self.compares and self.reference is not None and float(hparams.ld_alpha) != 1:
            for shards in sources.values():
                if read_reference_tails(shards, self.reference) is None:
                    raise InputError(
                        f"the reference log-probabilities {self.reference} of {shards.folder} were kept without the "
                        f"parts that ld_alpha={float(hparams.ld_alpha):g} weighs; remove their folder and tune again"
                    )
        return super().source(config, train_config, hparams, sources, plan)

    def rows(self, shards: TokenShards, seq_len: int) -> Rows:
        """Return the pairs of a split."""
        kept = self.kept_reference(shards)
        if kept is None or self.reference is None:
            return PairRows(shards, seq_len)
        tails = read_reference_tails(shards, self.reference)
        return PairRows(shards, seq_len, kept, np.zeros_like(kept) if tails is None else tails)

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the arrays of both answers, their weights, and reference log-probabilities that are kept."""
        spec = super().batch_spec(config, train_config, batch_size, seq_len, evaluation=evaluation)
        if self.compares and self.reference is not None:
            sums = ("reference_chosen", "reference_rejected")
            spec |= dict.fromkeys((*sums, *(f"{name}_tail" for name in sums)), spec["weights"])
        return spec

    def count(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Return the weight of all pairs, and the chosen tokens that a loss of their text is a mean over."""
        tokens = jnp.sum(self._text_mask(batch))
        return {"examples": jnp.sum(self.weights(batch)), "tokens": jnp.maximum(tokens, 1)}

    def loss(
        self,
        config: ModelConfig,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        hparams: HParams | None = None,
        key: PRNGKeyArray | None = None,
        *,
        count: dict[str, Float[Array, ""]] | None = None,
        microbatches: int = 1,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return (total loss, sums), as `Objective.loss` says; means over pairs are weighted.

        The reward of an answer is β times its log ratio to the reference; for a loss without one, β times its mean
        log-probability per token. `nll_weight` adds the loss of the chosen answers' tokens (Pang et al. 2024, RPO).
        `ld_alpha` weighs the log-probabilities of the tokens by which an answer is the longer one of its pair, here and
        in the reference (Liu et al. 2024, LD-DPO).
        Both rewards may fall while the margin between them grows. frozen: the base of an adapter, or all parameters of
        a reference model; read where the batch has no reference log-probabilities.
        """
        numbers = HParams() if hparams is None else hparams
        count = self.count(batch) if count is None else count
        policy, reference = self.models(params, frozen, hparams)
        rows, mask = (self.both(batch, "tokens"), self.both(batch, "segment_ids")), self.both(batch, "mask")
        mask = mask.astype(jnp.float32)
        text_mask = self._text_mask(batch)
        of_chosen = jnp.stack([text_mask, jnp.zeros_like(text_mask)], axis=1).reshape(mask.shape)
        weighted = mask * _length_weights(mask, numbers.ld_alpha)
        masks, squares = [weighted, of_chosen], None
        if self.weighting == "wpo":
            masks, squares = [*masks, mask], mask[None]
        found, auxiliary = self.log_probs(
            config, policy, rows, jnp.stack(masks), numbers, key, execution, squares=squares
        )
        log_p, chosen_text = found[0].reshape(-1, 2), found[1].reshape(-1, 2)[:, 0]
        if not self.compares:
            there = jnp.zeros_like(log_p)
        elif "reference_chosen" in batch:
            there = jnp.stack([batch["reference_chosen"], batch["reference_rejected"]], axis=1)
            if "reference_chosen_tail" in batch:
                tails = jnp.stack([batch["reference_chosen_tail"], batch["reference_rejected_tail"]], axis=1)
                there -= (1 - numbers.ld_alpha) * tails
        else:
            there = self.reference_log_probs(config, reference, rows, weighted, execution).reshape(-1, 2)
        tokens = jnp.sum(mask, axis=1).reshape(-1, 2)
        pairs = PairLogProbs(*log_p.T, *there.T, *tokens.T)
        weights = self.weights(batch)
        mean = functools.partial(weighted_mean, weights=weights, count=count["examples"])
        nll = -jnp.sum(jnp.where(weights > 0, chosen_text, 0)) / count["tokens"]
        losses = LOSSES[self.kind](pairs, numbers, self.divergence)
        if self.weighting == "wpo":
            losses *= _agreement(found[2].reshape(-1, 2), found[3].reshape(-1, 2), tokens)
        loss = mean(losses)
        loss += nll if self.kind == "orpo" else numbers.nll_weight * nll
        rewards = (log_p - there) if self.compares else log_p / jnp.maximum(tokens, 1)
        chosen, rejected = numbers.beta * rewards[:, 0], numbers.beta * rewards[:, 1]
        accuracy = (chosen > rejected).astype(jnp.float32)
        values = (accuracy, chosen - rejected, chosen, rejected, pairs.chosen, pairs.rejected)
        means = {name: mean(value) for name, value in zip(_MEANS, values, strict=True)}
        total = loss + balance_loss(auxiliary, hparams, microbatches)
        return total, {"loss": loss, "total_loss": total, self.WEIGHT: jnp.sum(weights)} | means

    def _text_mask(self, batch: Batch) -> Float[Array, "pairs seq"]:
        """Return the chosen rows' tokens whose own loss counts: the answer's, and the prompt's too for ORPO."""
        mask = jnp.asarray(batch["chosen_mask"], jnp.float32)
        if self.kind == "orpo":
            # Everything up to the last token of the answer: padding comes after it.
            mask = jax.lax.cummax((mask > 0).astype(jnp.float32), axis=1, reverse=True)
            if "chosen_segment_ids" in batch:
                mask = (batch["chosen_segment_ids"] > 0).astype(jnp.float32)
        return mask.at[:, 0].set(0)  # nothing predicts the first token


def _length_weights(mask: Float[Array, "rows seq"], alpha: Array) -> Float[Array, "rows seq"]:
    """Return `alpha` for the tokens by which an answer is longer than the other one of its pair, 1 for all others.

    mask: of adjacent rows of pairs. Answers of 2 and 4 tokens have the weights 1 1 and 1 1 α α.
    """
    place = jnp.cumsum(mask.at[:, 0].set(0), axis=1)  # nothing predicts the first token
    shared = jnp.repeat(jnp.min(place[:, -1].reshape(-1, 2), axis=1), 2)
    return jnp.where(place > shared[:, None], alpha, 1.0)


def _agreement(
    log_p: Float[Array, "pairs 2"], log_squares: Float[Array, "pairs 2"], tokens: Float[Array, "pairs 2"]
) -> Float[Array, " pairs"]:
    """Return the weight of each pair: how likely the policy is to write its answers (Zhou et al. 2024, WPO).

    The product over both answers of exp(mean over tokens of log p − log Σ p²), without a gradient. The ratio p / Σ p²
    is 1 on average over tokens that the policy draws.
    """
    mean = (log_p - log_squares) / jnp.maximum(tokens, 1)
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(mean, axis=1)))


@dataclasses.dataclass(frozen=True)
class Rated(ReferencedObjective):
    """KTO (Ethayarajh et al. 2024): answers that are each good or bad, without an answer to compare with.

    A batch has tokens, mask, segment_ids and labels int32 [answers] (1: good); mismatched_tokens, mismatched_mask,
    mismatched_segment_ids, the same prompts with answers to other ones, on which the policy's distance from its
    reference is measured; and optionally weights, reference and mismatched_reference float32 [answers]. The reference
    point is the mean over a whole batch, so that microbatches do not add up.
    """

    NAME: ClassVar[str] = "rated"
    KIND: ClassVar[str] = "rated"
    SIDES: ClassVar[tuple[str, str]] = ("", "mismatched_")

    @property
    def separable(self) -> bool:
        """Return whether microbatches add up to the loss of their batch."""
        return False

    def rows(self, shards: TokenShards, seq_len: int) -> Rows:
        """Return the rated answers of a split."""
        return RatedRows(shards, seq_len, self.kept_reference(shards))

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the arrays of both answers, the labels, and reference log-probabilities that are kept."""
        spec = super().batch_spec(config, train_config, batch_size, seq_len, evaluation=evaluation)
        if not evaluation:
            del spec["weights"]
        spec["labels"] = jax.ShapeDtypeStruct((batch_size,), np.int32)
        if self.reference is not None:
            number = jax.ShapeDtypeStruct((batch_size,), np.float32)
            spec |= {"reference": number, "mismatched_reference": number}
        return spec

    def count(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Return the weights of all answers, of the good and of the bad ones."""
        weights, good = self.weights(batch), batch["labels"] > 0
        sides = {"good": jnp.sum(weights * good), "bad": jnp.sum(weights * ~good)}
        return {"examples": jnp.sum(weights)} | {name: jnp.maximum(total, 1e-6) for name, total in sides.items()}

    def rows_read(self) -> tuple[int, int, int]:
        """Return the rows of an example that are trained on, read by the policy alone, and read by the reference."""
        return 1, 1, 2 if self.reference is None else 0

    def loss(
        self,
        config: ModelConfig,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        hparams: HParams | None = None,
        key: PRNGKeyArray | None = None,
        *,
        count: dict[str, Float[Array, ""]] | None = None,
        microbatches: int = 1,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return (total loss, sums), as `Objective.loss` says.

        chosen_reward and chosen_log_prob are means over the good answers, the rejected ones over the bad; accuracy is
        the share of answers whose reward lies on the right side of the reference point. Without mismatched answers that
        point is 0. frozen: as of `Preference.loss`.
        """
        numbers = HParams() if hparams is None else hparams
        count = self.count(batch) if count is None else count
        policy, reference = self.models(params, frozen, hparams)

        def log_ratio(side: str, key: PRNGKeyArray | None) -> tuple[Float[Array, " answers"], Array, Mapping]:
            rows = (batch[f"{side}tokens"], batch.get(f"{side}segment_ids"))
            mask = batch[f"{side}mask"].astype(jnp.float32)
            found, auxiliary = self.log_probs(config, policy, rows, mask[None], numbers, key, execution)
            there = batch.get(f"{side}reference")
            if there is None:
                there = self.reference_log_probs(config, reference, rows, mask, execution)
            return found[0] - there, found[0], auxiliary

        weights, good = self.weights(batch), batch["labels"] > 0
        ratio, log_p, auxiliary = log_ratio("", key)
        point = jnp.zeros(())
        if "mismatched_tokens" in batch:
            distance = weighted_mean(log_ratio("mismatched_", key)[0], weights, count["examples"])
            point = jax.lax.stop_gradient(jnp.maximum(distance, 0))
        loss = weighted_mean(rated_kto(ratio, good, point, numbers), weights, count["examples"])
        reward = numbers.beta * ratio
        right = ((reward > numbers.beta * point) == good).astype(jnp.float32)
        of_good = functools.partial(weighted_mean, weights=weights * good, count=count["good"])
        of_bad = functools.partial(weighted_mean, weights=weights * ~good, count=count["bad"])
        chosen, rejected = of_good(reward), of_bad(reward)
        accuracy = weighted_mean(right, weights, count["examples"])
        means = (accuracy, chosen - rejected, chosen, rejected, of_good(log_p), of_bad(log_p))
        total = loss + balance_loss(auxiliary, hparams, microbatches)
        sums = {"loss": loss, "total_loss": total, self.WEIGHT: jnp.sum(weights)}
        return total, sums | dict(zip(_MEANS, means, strict=True))

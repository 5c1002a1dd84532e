"""Masked language modelling (BERT, Devlin et al. 2019, section 3.1): predict masked tokens from both sides."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import numpy as np
from jaxtyping import Float64

from model import InputError, ModelConfig
from model.errors import check_number
from model.tokenizer.extend import MASK
from train.config import HParams, TrainConfig
from train.data.manifest import Manifest
from train.data.noise import Noise
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec, special_ids
from train.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModeling(TokenObjective):
    """Predict tokens chosen with probability `HParams.mask_rate`, from their masks or other replacements.

    mask_id: id of the mask token; None: the last id of the model's vocabulary. masked, random: fractions of the chosen
    tokens replaced by the mask and by random tokens; the others are kept. evaluation_rate: mask rate of validation,
    separate from the training rate, so that runs of different rates are compared on the same positions. End tokens of
    documents are never chosen.
    """

    NAME: ClassVar[str] = "masked"
    POSITIVE = ("evaluation_rate",)

    mask_id: int | None = None
    masked: float = 0.8
    random: float = 0.1
    evaluation_rate: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked + self.random > 1 + 1e-9:
            raise InputError(f"masked={self.masked} and random={self.random} are shares and must sum to at most 1")
        check_number("evaluation_rate", self.evaluation_rate, most=1)

    def fit(self, config: ModelConfig, manifest: Manifest | None = None) -> tuple[ModelConfig, Self]:
        """Return an encoder with BERT's head and, unless mask_id is set, one more id for the mask."""
        del manifest
        if config.stack == "encoder" and config.head != "masked-language-model":
            config = config.replace(head="masked-language-model", head_bias=True, pooler=False)
        if self.mask_id is not None:
            return config, self
        return config.replace(vocab_size=config.vocab_size + 1), self.replace(mask_id=config.vocab_size)

    def resolved(self, config: ModelConfig) -> Self:
        """Return the objective with mask_id set."""
        return self.replace(mask_id=self._mask_id(config))

    def special_tokens(self, config: ModelConfig) -> dict[int, str]:
        """Return the mask's id with BERT's name for it."""
        return {self._mask_id(config): MASK}

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError for a model without BERT's head, a mask_id outside its vocabulary, or a short context."""
        if config.head != "masked-language-model":
            raise InputError(
                f"objective='masked' trains encoders with head='masked-language-model', not stack={config.stack!r} "
                f"with head={config.head!r}; take a bert preset, or set stack=encoder head=masked-language-model"
            )
        if self.mask_id is not None and not 0 <= self.mask_id < config.vocab_size:
            raise InputError(
                f"mask_id={self.mask_id} lies outside the model's vocabulary; set vocab_size={self.mask_id + 1}, or "
                f"a mask_id below {config.vocab_size}"
            )
        super().check(config, train_config)

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError if the mask's id is also the id of a text token."""
        super().check_data(config, sources)
        for source in sources.values():
            special_ids(source.manifest, [self._mask_id(config)], source.folder, "the mask")

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the arrays of text with a loss mask, for validation also segment ids, which are 0 for padding."""
        spec = super().batch_spec(config, train_config, batch_size, seq_len, evaluation=evaluation)
        more = {"loss_mask": np.float32} | ({"segment_ids": np.int32} if evaluation else {})
        return spec | {name: jax.ShapeDtypeStruct((batch_size, seq_len), dtype) for name, dtype in more.items()}

    def corrupt(
        self, config: ModelConfig, batch: Batch, noise: Noise, manifest: Manifest, hparams: HParams | None
    ) -> Batch:
        """Return corrupted tokens, the original tokens as targets, and a loss mask of the chosen positions.

        The positions chosen at one rate include all those chosen at any lower rate.
        """
        tokens = batch["tokens"]
        rate = self.evaluation_rate if hparams is None else float(hparams.mask_rate)
        real = batch["loss_mask"] > 0 if "loss_mask" in batch else np.ones(tokens.shape, bool)
        chosen = (noise.uniform(0) < rate) & real & (tokens != manifest.eos_id)
        kind = noise.uniform(1)
        random_tokens = (noise.uniform(2) * manifest.vocab_size).astype(np.int32)
        replacements = np.where(kind < self.masked, np.int32(self._mask_id(config)), random_tokens)
        corrupted = np.where(chosen & (kind < self.masked + self.random), replacements, tokens)
        result = {**batch, "tokens": corrupted, "targets": tokens, "loss_mask": chosen.astype(np.float32)}
        if hparams is None and "segment_ids" not in batch:
            result["segment_ids"] = real.astype(np.int32)
        return result

    def context_free_nats(
        self, config: ModelConfig, batch: Batch, manifest: Manifest, frequencies: Float64[np.ndarray, " vocab"]
    ) -> Float64[np.ndarray, "batch seq"]:
        """Return the nats of the best prediction from the unigram frequencies and the input token at the position.

        By Bayes' rule, an input token x that is not the mask was kept with probability
        p = kept · f(x) / (kept · f(x) + random / vocab_size), where kept = 1 - masked - random; the target t then has
        the probability p · [t = x] + (1 - p) · f(t). A model learns this long before it attends to other positions; at
        the default fractions its loss is about half a nat below that of the frequencies alone.
        """
        inputs, targets = batch["tokens"], batch["targets"]
        kept = (1 - self.masked - self.random) * frequencies[inputs]
        drawn = np.full(inputs.shape, self.random / manifest.vocab_size)
        p_kept = np.divide(kept, kept + drawn, out=np.zeros(inputs.shape), where=kept + drawn > 0)
        p_kept = np.where(inputs == self._mask_id(config), 0, p_kept)
        return -np.log((1 - p_kept) * frequencies[targets] + p_kept * (inputs == targets))

    def _mask_id(self, config: ModelConfig) -> int:
        return config.vocab_size - 1 if self.mask_id is None else self.mask_id

"""Supervised fine-tuning: predict what the assistant says in conversations, packed by best fit."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from model import InputError, ModelConfig
from train.config import HParams, TrainConfig
from train.data.examples.batches import Conversations, PackedConversations, validation_examples
from train.data.kinds import check_kind
from train.data.mixture import PhasedLoader
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec
from train.objectives.tokens import TokenObjective
from train.plan import Plan


@dataclasses.dataclass(frozen=True)
class Instruction(TokenObjective):
    """Cross-entropy of the assistant's tokens, the end of each turn among them, in nats per such token.

    Rows hold whole conversations, each a segment of its own: nothing of one enters another's loss. A source of plain
    text beside conversations (a mixture, against forgetting) is packed likewise, and all of it is trained. The mean is
    over the trained tokens of the whole batch, however many microbatches divide it. packed: whether a row holds as many
    conversations as fit; else one, and the rows are those of the data folder.
    """

    NAME: ClassVar[str] = "instruction"
    UNIT: ClassVar[str] = "nats per trained token"

    packed: bool = True

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError on a model that is no decoder with a language-model head, or has too short a context."""
        if config.stack != "decoder" or config.head != "language-model":
            raise InputError(
                f"objective='instruction' trains decoders with a language-model head, not stack={config.stack!r} with "
                f"head={config.head!r}"
            )
        super().check(config, train_config)

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError unless the first source holds conversations, and the others do or hold text."""
        super().check_data(config, sources)
        for number, source in enumerate(sources.values()):
            check_kind(source, *(("chat",) if number == 0 else ("chat", "text")))

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return tokens, targets and the mask of what is trained, with the conversations told apart."""
        del config, train_config, evaluation
        names = ("tokens", "targets", "segment_ids", "positions")
        spec = {name: jax.ShapeDtypeStruct((batch_size, seq_len), np.int32) for name in names}
        return spec | {"loss_mask": jax.ShapeDtypeStruct((batch_size, seq_len), np.float32)}

    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return packed rows, each once per epoch, in an order from the seed."""
        del config, train_config
        return PhasedLoader(sources, plan, seed=hparams.order_seed, rows=self._rows)

    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the first packed rows of the validation split, as many as have `max_tokens` tokens."""
        del config
        rows = self._rows(TokenShards(folder, "validation"), train_config.seq_len)
        return validation_examples(rows, train_config.batch_size, max_tokens)

    def _rows(self, shards: TokenShards, seq_len: int) -> PackedConversations:
        is_chat = shards.manifest.kind == "chat"
        return (PackedConversations if self.packed or not is_chat else Conversations)(shards, seq_len)

"""Language modelling: predict the next token."""

import dataclasses
from typing import ClassVar

from model import InputError, ModelConfig
from train.config import TrainConfig
from train.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True)
class LanguageModeling(TokenObjective):
    """Next-token prediction by a decoder."""

    NAME: ClassVar[str] = "language-modeling"
    LIKELIHOOD: ClassVar[bool] = True
    UNIT: ClassVar[str] = "nats per token"

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError unless the model is a decoder with a language-model head and a long enough context."""
        if config.stack != "decoder" or config.head != "language-model":
            raise InputError(
                f"objective='language-modeling' trains decoders on plain text, not stack={config.stack!r} with "
                f"head={config.head!r}; take objective=masked for an encoder, objective=spans for an encoder-decoder"
            )
        super().check(config, train_config)

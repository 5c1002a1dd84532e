"""The settings of a continuation: how its tokens are drawn and where it ends, validated on construction."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.errors import InputError, check_number, check_whole

MOST_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one prompt's continuation.

    Logits are changed in this order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty,
    temperature, top_k, top_p, min_p. Raises InputError on a value out of range.

    temperature: 0 takes the token with the largest biased and penalised logit; the first one of a tie.
    top_k: keeps exactly the k most likely tokens, the first ones of a tie; 0 keeps all.
    top_p: keeps, of what top_k left and renormalised, the smallest set with at least this probability (Holtzman et al.
        2020, section 3.1).
    min_p: keeps tokens at least this times as probable as the most likely (Nguyen et al. 2024). The most likely is
        always kept, so the result is the same before and after top_k and top_p.
    repetition_penalty: divides positive logits, and multiplies negative ones, of all tokens in prompt and output
        (Keskar et al. 2019, section 4.1).
    presence_penalty, frequency_penalty: subtracted from the logit of each token in the output, once and once per
        occurrence, as in OpenAI's API.
    logit_bias: {id: value added to its logit}, −inf to ban the id; stored as sorted pairs.
    stop_ids: None means the config's `eos_token_ids`.
    stop_strings: need a tokenizer.
    n: samples per prompt.
    logprobs: number of most likely tokens whose log-probabilities are returned, at most MOST_LOGPROBS.
    seed: of a row's draws; None derives the row's key from the key of the call and the row's index.
    min_tokens: stop ids cannot come before as many tokens; stop strings can.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    n: int = 1
    logprobs: int = 0
    seed: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0, hint="0 is greedy")
        check_number("top_p", self.top_p, above=0, most=1, hint="1 keeps every token")
        check_number("min_p", self.min_p, least=0, most=1, hint="0 keeps every token")
        check_number("repetition_penalty", self.repetition_penalty, above=0, hint="1 changes nothing")
        check_number("presence_penalty", self.presence_penalty, hint="0 changes nothing")
        check_number("frequency_penalty", self.frequency_penalty, hint="0 changes nothing")
        check_whole("top_k", self.top_k, hint="0 keeps every token")
        check_whole("n", self.n, 1)
        check_whole("min_tokens", self.min_tokens, hint="0 lets a stop id come first")
        check_whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**32 - 1)
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _token_ids(self.stop_ids))
        strings = self.stop_strings
        is_list = isinstance(strings, Sequence) and not isinstance(strings, str)
        if not is_list or not all(isinstance(text, str) and text for text in strings):
            raise InputError(f"stop_strings={strings!r} must be a tuple of non-empty strings")
        object.__setattr__(self, "stop_strings", tuple(strings))


def _bias_pairs(given: Any) -> tuple[tuple[int, float], ...]:
    message = f"logit_bias={given!r} must map every id to one number below infinity; −inf bans a token"
    try:
        pairs = [(token, float(bias)) for token, bias in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError) as error:
        raise InputError(message) from error
    if any(math.isnan(bias) or bias == math.inf for _, bias in pairs) or len(dict(pairs)) < len(pairs):
        raise InputError(message)
    _token_ids([token for token, _ in pairs], "logit_bias")
    return tuple(sorted((int(token), bias) for token, bias in pairs))


def _token_ids(given: Any, name: str = "stop_ids") -> tuple[int, ...]:
    def is_id(token: Any) -> bool:
        return isinstance(token, int | np.integer) and bool(token >= 0)

    if not isinstance(given, Sequence | np.ndarray) or not all(is_id(token) for token in given):
        raise InputError(f"{name}={given!r} must hold token ids, whole numbers of at least 0")
    return tuple(int(token) for token in given)


GREEDY = Sampling(temperature=0.0)

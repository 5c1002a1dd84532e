"""What may be asked of a continuation: how its tokens are drawn and where it ends, checked at once."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.checks import check_number, check_whole
from model.errors import InputError

MOST_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one prompt is continued. What changes the logits comes in this order: logit_bias, repetition_penalty,
    presence_penalty and frequency_penalty, temperature, top_k, top_p, min_p. Raises InputError on a bad setting.

    temperature: 0 takes the token of the largest biased and penalised logit, the first among equals.
    top_k: exactly the k likeliest stay, the first among equals; 0: all.
    top_p: of what top_k left, renormalised, the smallest set with at least this probability stays (Holtzman et al.
        2020, section 3.1).
    min_p: tokens at least this times as probable as the likeliest stay (Nguyen et al. 2024). The likeliest is never
        cut, so this reads the same before and after top_k and top_p.
    repetition_penalty: positive logits of all tokens of prompt and output are divided by it, negative ones multiplied
        (Keskar et al. 2019, section 4.1).
    presence_penalty, frequency_penalty: subtracted from the logits of the output's tokens, once and as often as each
        occurs, as in OpenAI's API.
    logit_bias: {id: what is added to its logit}, −inf to ban it; kept as sorted pairs.
    stop_ids: None means the config's `eos_token_ids`.
    stop_strings: need a tokenizer.
    n: samples per prompt.
    logprobs: of how many of the likeliest tokens the log-probabilities are given, at most MOST_LOGPROBS.
    seed: of a row's draws; None: from `generate`'s key and the row's number.
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

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0, hint="0 is greedy")
        check_number("top_p", self.top_p, above=0, most=1, hint="1 keeps every token")
        check_number("min_p", self.min_p, least=0, most=1, hint="0 keeps every token")
        check_number("repetition_penalty", self.repetition_penalty, above=0, hint="1 changes nothing")
        check_number("presence_penalty", self.presence_penalty, hint="0 changes nothing")
        check_number("frequency_penalty", self.frequency_penalty, hint="0 changes nothing")
        check_whole("top_k", self.top_k, hint="0 keeps every token")
        check_whole("n", self.n, 1)
        check_whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**32 - 1)
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _token_ids(self.stop_ids))
        strings = self.stop_strings
        listed = isinstance(strings, Sequence) and not isinstance(strings, str)
        if not listed or not all(isinstance(text, str) and text for text in strings):
            raise InputError(f"stop_strings={strings!r} must be a tuple of strings that are not empty")
        object.__setattr__(self, "stop_strings", tuple(strings))


def _bias_pairs(given: Any) -> tuple[tuple[int, float], ...]:
    wish = f"logit_bias={given!r} must map every id to one number below infinity; −inf bans a token"
    try:
        pairs = [(token, float(bias)) for token, bias in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError) as error:
        raise InputError(wish) from error
    if any(math.isnan(bias) or bias == math.inf for _, bias in pairs) or len(dict(pairs)) < len(pairs):
        raise InputError(wish)
    _token_ids([token for token, _ in pairs], "logit_bias")
    return tuple(sorted((int(token), bias) for token, bias in pairs))


def _token_ids(given: Any, name: str = "stop_ids") -> tuple[int, ...]:
    good = lambda token: isinstance(token, int | np.integer) and token >= 0
    if not isinstance(given, Sequence | np.ndarray) or not all(good(token) for token in given):
        raise InputError(f"{name}={given!r} must hold token ids, whole numbers from 0 on")
    return tuple(int(token) for token in given)


GREEDY = Sampling(temperature=0.0)

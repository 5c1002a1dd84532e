"""Choosing the next token: the settings of a continuation, and the sampler that follows them on the device."""

from infer.sampling.sampler import (
    Choice,
    History,
    SamplerState,
    check_bias,
    choose,
    describe,
    distribution,
    idle_rows_greedy,
    row_keys,
    truncate,
)
from infer.sampling.settings import GREEDY, MOST_LOGPROBS, Sampling

__all__ = [
    "Sampling",
    "GREEDY",
    "MOST_LOGPROBS",
    "SamplerState",
    "History",
    "Choice",
    "row_keys",
    "check_bias",
    "choose",
    "describe",
    "distribution",
    "truncate",
    "idle_rows_greedy",
]

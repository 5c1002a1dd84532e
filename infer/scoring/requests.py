"""Check the requests of `infer.score` and turn them into arrays."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from model import ModelConfig
from model.errors import InputError, check_at_least_one, check_whole

IdPair = tuple[np.ndarray, np.ndarray]
"""Ids of a context and a continuation, int32 each."""


def check_options(config: ModelConfig, batch_size: int, top_k: int) -> None:
    """Raise InputError if the model predicts no next token, or an option is out of range."""
    if config.head != "language-model" or config.stack == "encoder":
        raise InputError(
            f"a model with stack={config.stack!r} and head={config.head!r} predicts no next token; score needs a "
            "decoder or an encoder-decoder with head='language-model'"
        )
    check_at_least_one(batch_size=batch_size)
    check_whole("top_k", top_k, 0, config.vocab_size, hint="the vocabulary has no more tokens")


def id_pairs(config: ModelConfig, requests: Iterable[Any]) -> list[IdPair]:
    """Return the requests as arrays; an empty context becomes the first of the config's `eos_token_ids`.

    Raises InputError that names the first request that cannot be scored.
    """
    pairs = []
    for number, request in enumerate(requests):
        if isinstance(request, str) or not hasattr(request, "__len__") or len(request) != 2:
            raise InputError(f"request {number} is {request!r:.60}; give (context ids, continuation ids)")
        context = _ids(config, number, "context", request[0])
        continuation = _ids(config, number, "continuation", request[1])
        if not len(continuation):
            raise InputError(f"request {number} has an empty continuation; give it at least one token to score")
        if not len(context):
            if not config.eos_token_ids:
                raise InputError(
                    f"request {number} has an empty context and the config no eos_token_ids to stand for it; "
                    "give the context a token that begins a text"
                )
            context = np.array(config.eos_token_ids[:1], np.int32)
        _check_fits(config, number, len(context), len(continuation))
        pairs.append((context, continuation))
    return pairs


def _ids(config: ModelConfig, number: int, name: str, ids: Any) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of several lengths
        array = np.zeros((1, 1))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"request {number}: its {name} is {ids!r:.60}; give a flat list of token ids, whole numbers")
    wrong = (array < 0) | (array >= config.vocab_size)
    if wrong.any():
        raise InputError(
            f"request {number}: its {name} has the id {array[wrong.argmax()]}, outside the vocabulary of "
            f"{config.vocab_size}; was it encoded with this model's tokenizer?"
        )
    return array.astype(np.int32)


def _check_fits(config: ModelConfig, number: int, context: int, continuation: int) -> None:
    most = config.max_seq_len
    if config.stack == "encoder-decoder":
        for name, length in (("context", context), ("continuation", continuation)):
            if length > most:
                raise InputError(
                    f"request {number}: its {name} of {length} tokens is longer than max_seq_len={most}; shorten it"
                )
    elif context + continuation - 1 > most:
        raise InputError(
            f"request {number}: {context} tokens of context and {continuation} of continuation, the last of which is "
            f"not read, do not fit max_seq_len={most}; leave out tokens at the beginning of the context"
        )

"""Encode a context and its continuation, and decide where the ids of the continuation begin."""

from collections.abc import Sequence

from experiments.evaluate.tasks.task import Boundary
from model.tokenizer import Tokenizer


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], boundary: Boundary = "common-prefix"
) -> list[tuple[list[int], list[int]]]:
    """Return the ids of (context, continuation) for each pair of texts; they join to the ids of the whole text.

    Blanks at the end of a context belong to the continuation, as in lm-evaluation-harness. A token may reach over the
    boundary of the texts: "lm-eval" gives the continuation all ids after as many as the context alone has;
    "common-prefix" all ids after the longest prefix that whole text and context have in common. Example: where "go" +
    "od" is one token, "lm-eval" counts one id for the context and leaves none for the continuation; "common-prefix"
    gives it to the continuation. An empty context has no ids.
    """
    moved = [_with_blanks_moved(context, continuation) for context, continuation in pairs]
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids_of = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    encoded = []
    for (context, _), whole in zip(moved, wholes, strict=True):
        alone = ids_of[context] if context else []
        length = len(alone) if boundary == "lm-eval" else common_prefix(alone, whole)
        encoded.append((list(whole[:length]), list(whole[length:])))
    return encoded


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of ids at the beginning that both have in common."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


def _with_blanks_moved(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation

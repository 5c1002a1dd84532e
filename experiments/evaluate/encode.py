"""Encode a context and its continuation, and decide where the ids of the continuation begin."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.evaluate.tasks.task import Boundary
from model.tokenizer import Tokenizer
from model.tokenizer.control import NONCHARACTERS, ChatText


class Encoded(NamedTuple):
    """Ids of a context and its continuation. differs: a token reaches over the boundary of the texts."""

    context: list[int]
    continuation: list[int]
    differs: bool


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    boundary: Boundary = "common-prefix",
    *,
    encoder_decoder: bool = False,
) -> list[Encoded]:
    """Return the ids of (context, continuation) for each pair of texts.

    Blanks at the end of a context belong to the continuation, as in lm-evaluation-harness. A token may reach over the
    boundary of the texts: "lm-eval" takes the ids of the context alone, and of the whole text all after as many;
    "common-prefix" divides the whole text's ids where they first differ from the context's. Example: where "go" + "od"
    is one token, "lm-eval" counts one id for the context and leaves none for the continuation, so that the common
    prefix decides, which gives the token to the continuation.

    A tokenizer with a begin token puts it first. Where the context has no ids left, a token that begins a text stands
    for it: the begin token, or without one the end token. A context of type `ChatText` begins as its template says.
    encoder_decoder: context and continuation are encoded apart, the context as the encoder reads it.
    """
    moved = [_with_blanks_moved(*pair) for pair in pairs]
    contexts = _ids(tokenizer, [context for context, _ in moved], around=encoder_decoder)
    if encoder_decoder:
        continuations = _ids(tokenizer, [continuation for _, continuation in moved], begins=False)
        return [Encoded(context, tail, False) for context, tail in zip(contexts, continuations, strict=True)]
    wholes = _ids(tokenizer, [_joined(*pair) for pair in moved])
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    encoded = []
    for (context, _), alone, whole in zip(moved, contexts, wholes, strict=True):
        if not context:  # nothing but a begin token, if any
            alone = whole[:1] if start is not None and whole[:1] == [start] else []
        common = common_prefix(alone, whole)
        differs = common < len(alone)
        common = min(common, max(len(whole) - 1, 0))  # at least one id to score
        if boundary == "lm-eval" and len(whole) > len(alone):
            first, rest = alone, whole[len(alone) :]
        else:
            first, rest = whole[:common], whole[common:]
        encoded.append(Encoded(first or ([] if start is None else [start]), rest, differs))
    return encoded


def encode_contexts(tokenizer: Tokenizer, contexts: Sequence[str], *, encoder_decoder: bool = False) -> list[list[int]]:
    """Return the ids of each context, begin token included, for generation; an empty one is the token that begins."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    encoded = _ids(tokenizer, contexts, around=encoder_decoder)
    return [ids or ([] if start is None else [start]) for ids in encoded]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of ids at the beginning that both have in common."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


def _ids(tokenizer: Tokenizer, texts: Sequence[str], *, around: bool = False, begins: bool = True) -> list[list[int]]:
    """Return the ids of each text; equal texts are encoded once, and special tokens are read in `ChatText` only.

    begins: plain text follows the begin token, if the tokenizer puts one. around: with all tokens that the tokenizer
    puts around a text, as an encoder reads them.
    """
    before = []
    if begins and not around and tokenizer.bos_id is not None:
        before = tokenizer.encode("a", add_special_tokens=True)[:1]
        before = before if before == [tokenizer.bos_id] else []
    plain = list(dict.fromkeys(text for text in texts if not isinstance(text, ChatText)))
    encoded = zip(plain, tokenizer.encode_batch(plain, add_special_tokens=around), strict=True)
    found = {text: [*before, *ids] for text, ids in encoded}
    chats = list({(str(text), text.masked): text for text in texts if isinstance(text, ChatText)}.values())
    encoded_chats = zip(chats, tokenizer.encode_batch(chats, special=True), strict=True)
    of_chats = {(str(text), text.masked): ids for text, ids in encoded_chats}
    return [list(of_chats[str(text), text.masked] if isinstance(text, ChatText) else found[text]) for text in texts]


def _joined(context: str, continuation: str) -> str:
    """Return the whole text; in a `ChatText` no name of a special token is looked for in the continuation."""
    if not isinstance(context, ChatText):
        return context + continuation
    return ChatText(context + continuation, context.masked + NONCHARACTERS[0] * len(continuation))


def _with_blanks_moved(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    blanks = context[len(stripped) :]
    return context.cut(0, len(stripped)) if isinstance(context, ChatText) else stripped, blanks + continuation

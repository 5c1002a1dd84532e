"""Equivalence of tokenizers from different files."""

from collections.abc import Iterable

from model.tokenizer.base import Tokenizer
from model.tokenizer.files import tokenizer_files

# Texts on which tokenizers differ: spaces, line ends, digits, contractions, capitals, accents, scripts and others.
_TEXTS = (
    *("", " ", "   ", "\n", "\n\n x", "\t", " a", "a ", "a  b", "a\r\nb", " \n \n", "\u00a0a", "\ufeffa"),
    *(
        "1234567 12,345.67",
        "x1y2",
        "don't WE'VE I'm",
        "HTTPServer camelCase",
        "été e\u0301 Å ½² ﬁ",
        "日本語 한국어 ไทย",
    ),
    *("🙂‍↔️ 👩🏽‍🚀", "\x00\x7f", "def f(x):\n    return x**2  # !?", "<s> </s> <unk> <|endoftext|>", "Ünïcödé ſ ა"),
)


def same_ids(first: Tokenizer, second: Tokenizer, texts: Iterable[str] = ()) -> bool:
    """Return whether two tokenizers encode text to the same ids and have the same end token.

    If their files differ, both encode `texts`, sample texts on which tokenizers differ, and the names of their special
    tokens, and decode every id that both have. One of them may have further ids, to which no text is encoded.
    """
    if tokenizer_files(first) == tokenizer_files(second):
        return True
    if first.eos_id != second.eos_id:
        return False
    names = {*first.special_tokens.values(), *second.special_tokens.values()}
    texts = [*_TEXTS, " ".join(sorted(names)), *texts]
    return first.encode_batch(texts) == second.encode_batch(texts) and _same_texts(first, second)


def _same_texts(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether every shared id that is special in neither has the same text in both.

    Texts of spaces only count as equal, since some libraries drop the space at the beginning of a text.
    """
    hidden = {*first.special_tokens, *second.special_tokens}
    shared = (i for i in range(min(first.vocab_size, second.vocab_size)) if i not in hidden)
    pairs = ((first.decode([i]), second.decode([i])) for i in shared)
    return all(one == other or not (one + other).strip(" ") for one, other in pairs)

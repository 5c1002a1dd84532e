"""Whether two tokenizers give the same ids, whatever files they come from."""

from collections.abc import Iterable

from model.tokenizer.base import Tokenizer
from model.tokenizer.files import tokenizer_files

# What tokenizers differ in: spaces, line ends, digits, contractions, capitals, accents, scripts, odd characters.
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
    """Return whether texts become the same ids in both, and the same token ends a document.

    Where their files differ, both encode `texts`, texts of the kind that tokenizers differ in and the names of their
    special tokens, and decode every id that both have: one of them may have more ids, which no text becomes.
    """
    if tokenizer_files(first) == tokenizer_files(second):
        return True
    if first.eos_id != second.eos_id:
        return False
    names = {*first.special_tokens.values(), *second.special_tokens.values()}
    texts = [*_TEXTS, " ".join(sorted(names)), *texts]
    return first.encode_batch(texts) == second.encode_batch(texts) and _same_texts(first, second)


def _same_texts(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether every id of both has one text; a special token of either has none.

    Spaces alone count as none: a space at the beginning of a text is dropped by some libraries only.
    """
    hidden = {*first.special_tokens, *second.special_tokens}
    shared = (i for i in range(min(first.vocab_size, second.vocab_size)) if i not in hidden)
    pairs = ((first.decode([i]), second.decode([i])) for i in shared)
    return all(one == other or not (one + other).strip(" ") for one, other in pairs)

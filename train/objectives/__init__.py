"""Training objectives by name: on text, on labels, on conversations, on preferences.

A new objective is one file and one line here; see docs/add-an-objective.md.
"""

from collections.abc import Mapping
from typing import Any

from model.errors import InputError, UnknownNameError
from train.objectives.classification import Classification
from train.objectives.instruction import Instruction
from train.objectives.language_modeling import LanguageModeling
from train.objectives.masked import MaskedLanguageModeling
from train.objectives.objective import Objective
from train.objectives.preference import Preference, Rated
from train.objectives.reward import Reward
from train.objectives.spans import SpanCorruption

OBJECTIVES: dict[str, type[Objective]] = {
    objective.NAME: objective
    for objective in (
        *(LanguageModeling, MaskedLanguageModeling, SpanCorruption, Classification),
        *(Instruction, Preference, Rated, Reward),
    )
}


def get(name: str) -> Objective:
    """Return the objective of a name, with default fields. Raises UnknownNameError."""
    if name not in OBJECTIVES:
        raise UnknownNameError("objective", name, OBJECTIVES)
    return OBJECTIVES[name]()


def from_dict(values: str | Mapping[str, Any]) -> Objective:
    """Read the output of `Objective.to_dict`, or a name alone. Raises InputError."""
    if isinstance(values, str):
        return get(values)
    name = values.get("name") if isinstance(values, Mapping) else None
    if not isinstance(name, str):
        raise InputError(
            f"objective={values!r} must be a name or a mapping with one; the names are {', '.join(OBJECTIVES)}"
        )
    return type(get(name)).from_dict({field: value for field, value in values.items() if field != "name"})


__all__ = [
    "OBJECTIVES",
    "Classification",
    "Instruction",
    "LanguageModeling",
    "MaskedLanguageModeling",
    "Objective",
    "Preference",
    "Rated",
    "Reward",
    "SpanCorruption",
    "from_dict",
    "get",
]

"""Numbers and nouns agree in every message of the experiments."""

import re
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.scaling import fit_parametric
from experiments.scaling.fit import isoflop_warnings
from experiments.words import counted, is_or_are
from model.errors import InputError


def test_one_is_singular():
    assert [counted(n, "run") for n in (0, 1, 2, 12_000)] == ["0 runs", "1 run", "2 runs", "12,000 runs"]
    assert counted(1, "degree of freedom") == "1 degree of freedom"
    assert counted(3, "degree of freedom") == "3 degrees of freedom"
    assert counted(2, "search", "searches") == "2 searches"
    assert [is_or_are(n) for n in (0, 1, 2)] == ["are", "is", "are"]


def test_messages_of_one_thing():
    with pytest.raises(InputError, match="only 1 different model size;"):
        fit_parametric([1e6] * 8, np.geomspace(1e8, 1e9, 8), np.linspace(3, 2, 8))
    with pytest.raises(InputError, match="1 usable run cannot"):
        fit_parametric([1e6], [1e8], [3.0])

    class OneBudget:
        class valley:
            loss = (1.0, 2.0, 3.0, 4.0)

        accepted = (valley,)

    texts = isoflop_warnings(OneBudget(), intervals=False)
    assert texts[0].startswith("1 budget: ")
    assert texts[1].startswith("1 run more than the curves of 1 budget use up")


def test_no_message_makes_a_plural_by_itself():
    """`{'s' if count > 1 else ''}` and its like: `counted` is the one way."""
    for path in Path(experiments.__file__).parent.rglob("*.py"):
        own = re.search(r"""(['"])s?\1 if [^}]* else (['"])s?\2\}""", path.read_text(encoding="utf-8"))
        assert own is None, f"{path}: {own[0]}"

"""The script that compares two commits finds a difference in the last bit, and none where there is none."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "same_outputs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("same_outputs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compare(*paths: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_one_bit_is_a_difference(tmp_path):
    record = {"programs": {"tiny train": "af"}, "commands": {"train": {"loss": 6.1, "rows": [1, math.nan], "step": 3}}}
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(record))
    assert _compare(before, before) == (0, "the records are the same\n")
    record["commands"]["train"]["loss"] = math.nextafter(6.1, 7)
    record["commands"]["train"]["rows"].append(2)
    del record["commands"]["train"]["step"]
    after.write_text(json.dumps(record))
    code, said = _compare(before, after)
    assert (code, said.splitlines()) == (
        1,
        [
            "commands/train/loss: 6.1 → 6.1000000000000005",
            "commands/train/rows: [1, NaN] → [1, NaN, 2]",
            'commands/train/step: 3 → "(missing)"',
        ],
    )


def test_measurements_and_names_of_functions_are_left_out(script):
    document = {"loss": 1.5, "seconds": 2.0, "rows": [{"tokens_per_second": 9.0, "steps": 4}], "claimed_at": "today"}
    assert script.stable(document) == {"loss": 1.5, "rows": [{"steps": 4}]}
    text = (
        "module @jit_step {{ func.func public @main() {{ call @{0} }} func.func private @{0}() {{ custom_call @F }} }}"
    )
    assert script.canonical(text.format("one")) == script.canonical(text.format("other"))
    assert script.canonical(text.format("one")) != script.canonical(text.format("one").replace("custom_call @F", "add"))

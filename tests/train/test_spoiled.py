"""A run's folder, spoiled on purpose: it resumes to the bit, or is refused in a sentence, or what is lost is named."""

import json
import logging
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.runs.report import write_run_page
from model import InputError, ModelConfig
from train import HParams, Shell, TrainConfig, load_run, train
from train.run import read_record
from train.run.metrics import open_metrics, read_metrics, troubles

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_003.0)
TRAIN = TrainConfig(batch_size=4, seq_len=16, norms=False)
SHELL = Shell(evaluate_every=3, evaluate_tokens=64, checkpoint_every=4)
STEPS, CRASH = 12, 10  # the newest checkpoint then is of step 8, and the record goes on to step 9


def go(data, run):
    return train(CONFIG, TRAIN, HParams(total_steps=STEPS), data=data, run=run, steps=STEPS, shell=SHELL)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("spoiled") / "whole"
    go(data, run)
    return run


@pytest.fixture(scope="module")
def killed_once(data, tmp_path_factory, crash):
    run = tmp_path_factory.mktemp("spoiled") / "killed"
    with crash(CRASH):
        go(data, run)
    return run


@pytest.fixture
def killed(killed_once, tmp_path):
    return Path(shutil.copytree(killed_once, tmp_path / "killed"))


def edit(change):
    """A function of lines as one of a file."""

    def on(path):
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return on


HOLES = {  # of the killed run's metrics.jsonl: what is done to it, and what is said of it
    "deleted": (lambda path: path.unlink(), "the file is missing; steps 1–8 are missing"),
    "emptied": (lambda path: path.write_bytes(b""), "steps 1–8 are missing"),
    "truncated": (edit(lambda lines: [*lines[:5], lines[5][:40]]), "line 6 cannot be read; steps 6–8 are missing"),
    "not UTF-8": (
        edit(lambda lines: [*lines[:2], b"\xff\xfe" + lines[2], *lines[3:]]),
        "line 3 cannot be read; step 3 is missing",
    ),
    "lines lost": (edit(lambda lines: [lines[0], *lines[2:4], *lines[6:]]), "steps 2, 5–6 are missing"),
    "a digit": (
        edit(lambda lines: [*lines[:3], lines[3].replace(b'"skipped": 0', b'"skipped": 1'), *lines[4:]]),
        "up to step 8 it is not what the run wrote",
    ),
    "a key": (
        edit(lambda lines: [lines[0], lines[1].replace(b'"tokens"', b'"tokeos"'), *lines[2:]]),
        "line 2 cannot be read; step 2 is missing",
    ),
    "a step": (
        edit(lambda lines: [lines[0], lines[1].replace(b'"step": 2', b'"step": 7'), *lines[2:]]),
        "line 2 cannot be read; step 2 is missing",
    ),
    "no object": (edit(lambda lines: [*lines[:7], b"[8]\n", *lines[8:]]), "line 8 cannot be read; step 8 is missing"),
}


@pytest.mark.parametrize("kind", HOLES)
def test_a_hole_in_the_record_is_named_and_stays_visible(whole, killed, data, tmp_path, caplog, record, kind):
    spoil, said = HOLES[kind]
    spoil(killed / "metrics.jsonl")
    spoiled = (killed / "metrics.jsonl").read_bytes() if kind != "deleted" else None
    assert said in read_hole(killed, tmp_path, caplog)
    before = {line["step"]: line for line in record(killed)}
    caplog.clear()
    go(data, killed)
    (warning,) = [line.getMessage() for line in caplog.records]
    assert said in warning
    assert warning.endswith("training continues from step 8")
    assert_same_parameters(killed, whole)
    # What is there is what was there, and goes on; what was lost stays lost, and is said for ever.
    wanted = [before.get(line["step"], line) for line in record(whole)]
    assert record(killed) == [line for line in wanted if line["step"] in before or line["step"] > 8]
    trouble = read_hole(killed, tmp_path, caplog)
    for part in said.split("; ")[-1:]:
        assert part in trouble
    aside = killed / "damaged" / "metrics.jsonl"
    assert aside.read_bytes() == spoiled if spoiled else not aside.exists()
    go(data, killed)
    assert not spoiled or aside.read_bytes() == spoiled


def read_hole(run, tmp_path, caplog):
    """What every reader says of a run's record, which must be the same."""
    caplog.clear()
    lines = read_metrics(run)
    (warning,) = [line.getMessage() for line in caplog.records]
    assert [warning] == troubles([run]) == [open_metrics(run).trouble]
    if lines:
        (row,) = write_run_page(tmp_path / "page.html", [run])
        assert row["trouble"] == warning
        assert warning in (tmp_path / "page.html").read_text()
    else:
        with pytest.raises(InputError, match=r"no step has been made yet; .*missing"):
            write_run_page(tmp_path / "page.html", [run])
    return warning


def test_folders_without_seals_open_and_resume_without_a_word(whole, killed, data, caplog, record):
    """As earlier versions left them; a hole in their steps is found all the same."""
    for run in (killed, whole):
        content = json.loads((run / "run.json").read_text())
        for name in ("metrics", "checksum", "wandb_id"):
            del content[name]
        old = run.with_name(f"old-{run.name}")
        shutil.copytree(run, old)
        (old / "run.json").write_text(json.dumps(content, indent=1) + "\n")
        assert not troubles([old])
        assert go(data, old).status == "finished"
        assert record(old) == record(whole)
        assert not caplog.records
        lines = (old / "metrics.jsonl").read_text().splitlines(keepends=True)
        (old / "metrics.jsonl").write_text("".join(lines[:4] + lines[6:]))
        assert "steps 5–6 are missing" in troubles([old])[0]


def test_a_record_that_was_changed_is_refused(whole, tmp_path, data):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = (run / "run.json").read_text()
    (run / "run.json").write_text(content.replace('"d_model": 16', '"d_model": 18'))
    for use in (load_run, read_record, lambda run: go(data, run)):
        with pytest.raises(InputError, match=r"run\.json is not what was written"):
            use(run)
    (run / "run.json").write_text(content)
    assert read_record(run)["status"] == "finished"


def test_a_run_whose_process_is_gone_is_not_running(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = (run / "run.json").read_text()
    (run / "run.json").write_text(content.replace('"status": "finished"', '"status": "running"'))
    assert read_record(run)["status"] == "interrupted"


def assert_same_parameters(one, other):
    for left, right in zip(*(jax.tree.leaves(load_run(run)[1]) for run in (one, other)), strict=True):
        np.testing.assert_array_equal(left, right)


SPOILS = {
    "truncated": lambda content, draw: content[: draw.randrange(len(content))],
    "flipped": lambda content, draw: flipped(content, draw),
    "deleted": None,
    "emptied": lambda content, draw: b"",
    "garbage": lambda content, draw: draw.randbytes(len(content)),
}


def flipped(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(int(os.environ.get("SPOILED_SEEDS", "1"))))
def test_every_file_spoiled(whole, killed, data, tmp_path, caplog, record, seed):
    caplog.set_level(logging.WARNING)
    outcomes, draw = Counter(), random.Random(seed)
    for base in (whole, killed):
        for file in sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file()):
            for name, spoil in SPOILS.items():
                run = tmp_path / "run"
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(base, run)
                content = (run / file).read_bytes()
                if spoil is None:
                    (run / file).unlink()
                elif content:
                    (run / file).write_bytes(spoil(content, draw))
                caplog.clear()
                what = f"{base.name}: {file} {name}"
                outcome = outcome_of(run, whole, data, caplog, record, tmp_path, what)
                outcomes[base.name, outcome] += 1
    print("\n", dict(outcomes))
    assert sum(outcomes.values()) > 100
    assert {outcome for _, outcome in outcomes} <= {"whole", "said", "refused"}


def outcome_of(run, whole, data, caplog, record, tmp_path, what):
    try:
        go(data, run)
        write_run_page(tmp_path / "page.html", [run])
        params = load_run(run)[1]
    except InputError as error:
        refusal = str(error)
        print(what, "→ refused:", refusal)
        return "refused" if "\n" not in refusal else "refused in many lines"
    said = [line.getMessage() for line in caplog.records]
    assert not [line for line in said if "\n" in line], what
    same = jax.tree.all(jax.tree.map(np.array_equal, params, load_run(whole)[1]))
    if same and record(run) == record(whole):
        return "whole"
    print(what, "→ said:", *said)
    assert said, f"{what}: a silent hole"
    if same:
        assert troubles([run]), f"{what}: a hole that is said once"
    else:  # the last checkpoint of a run that is finished
        assert "checkpoints/12 is not used" in said[-1], what
    return "said"

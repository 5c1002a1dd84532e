"""Folders that an earlier version left half done go on as what they were, and nothing in them is trained again.

`tests/fixtures/former/make.py` made them. They are unpacked at another place than they were made, and gone on with by
the commands that a user gives.
"""

import csv
import importlib.util
import json
import signal
import tarfile
import threading
from pathlib import Path

import pytest

from experiments.sweep.definition import define
from experiments.sweep.record import Sweep, TrialRequest
from experiments.sweep.trials import plan_trials
from model import presets
from model.store import open_model
from train.data import load_manifest

FORMER = Path(__file__).parents[1] / "fixtures" / "former"
EXPECTED = json.loads((FORMER / "expected.json").read_text())


@pytest.fixture(scope="module")
def commands():
    """The commands that made the folders, by case."""
    spec = importlib.util.spec_from_file_location("former_make", FORMER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.COMMANDS


@pytest.fixture(autouse=True)
def in_time():
    """Fail instead of waiting: a worker that does not know the trials of its ledger waits for them for ever."""

    def stop(number, frame):
        raise TimeoutError("a command did not come to its end")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(case) → unpack its folders, beside their data, in the working directory."""

    def unpack(case):
        for name in ("data", case):
            with tarfile.open(FORMER / f"{name}.tar.xz") as archive:
                archive.extractall(tmp_path, filter="data")
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return unpack


@pytest.fixture
def call(isoflop):
    """Call the command, which must succeed; its standard output."""

    def run(*arguments):
        code, out, error = isoflop(*arguments)
        assert code == 0, error
        return out

    return run


def record(run):
    return json.loads((run / "run.json").read_text())


def lines(folder):
    """Of every run below the folder, the lines of its metrics. They hold times: no line is written twice."""
    return {file.parent: file.read_bytes().splitlines() for file in sorted(folder.rglob("metrics.jsonl"))}


def trained(before, after):
    """How many steps were trained between two calls of `lines`."""
    return sum(len(set(after[run]) - set(before.get(run, ()))) for run in after)


def files(folder):
    """Every file below, by time and content."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def check_prefix(before, after, run, checkpoint):
    """What was recorded up to the checkpoint is as it was, and the steps after it follow on."""
    steps = [json.loads(line)["step"] for line in after[run]]
    assert steps == list(range(steps[0], record(run)["step"] + 1))
    kept = [line for line in before[run] if json.loads(line)["step"] <= checkpoint]
    assert kept
    assert after[run][: len(kept)] == kept


@pytest.mark.parametrize("name", ["plain", "remat", "kernel"])
def test_an_interrupted_run_goes_on(place, call, commands, name):
    run, was = place("runs") / name, EXPECTED["runs"][name]
    before, checkpoint = lines(run), max(was["checkpoints"])
    assert (record(run)["run_id"], record(run)["status"]) == (was["run_id"], was["status"])
    call(*commands[name])
    after, now = lines(run), record(run)
    assert (now["run_id"], now["status"], now["step"]) == (was["run_id"], "finished", 12)
    check_prefix(before, after, run, checkpoint)
    assert trained(before, after) == 12 - checkpoint
    call(*commands[name])
    assert lines(run) == after


def test_an_interrupted_branch_goes_on(place, call, commands):
    root, was = place("runs"), EXPECTED["runs"]["cooled/from-8"]
    run, trunk = root / "cooled" / "from-8", root / "trunk"
    before, of_trunk, checkpoint = lines(run), files(trunk), max(was["checkpoints"])
    again = (*commands["branch"], "--data", "data")  # which were moved
    call(*again)
    after, now = lines(run), record(run)
    assert (now["run_id"], now["status"], now["step"]) == (was["run_id"], "finished", 14)
    check_prefix(before, after, run, checkpoint)
    assert trained(before, after) == 14 - checkpoint
    call(*commands["trunk"])
    assert record(trunk)["run_id"] == EXPECTED["runs"]["trunk"]["run_id"]
    name = trunk / "metrics.jsonl"
    assert files(trunk)[name] == of_trunk[name]
    call(*again)
    assert lines(run) == after


def test_a_run_is_read(place, call, no_svg):
    root = place("runs")
    before = files(root)
    call("eval", "trunk", "--data", "data", "--seq-len", 32, "--evaluate-tokens", 256, "--json", "loss.json")
    loss = json.loads((root / "loss.json").read_text())["loss"]
    assert loss == pytest.approx(record(root / "trunk")["result"]["validation_loss"], rel=1e-5)
    vocab_size = load_manifest(root / "data").vocab_size
    for name in ("plain", "remat", "kernel", "trunk", "cooled/from-8"):
        assert open_model(root / name).config.vocab_size == vocab_size
    call("generate", "kernel", "--tokenizer", "data", "--prompt", "The river", "--max-new-tokens", 2)
    call("report", "plain", "remat", "trunk", "--out", "page.html")
    after = files(root)
    assert {path: after[path] for path in before} == before


def check_sweep(folder, was, before):
    """All trials are finished under their ids, and no step was trained but those that were missing."""
    after, missing = lines(folder), 0
    assert {run.name for run in (folder / "runs").iterdir()} == was["trials"].keys()
    for name, trial in was["trials"].items():
        run, old = folder / "runs" / name, trial.get("run")
        start = trial["parent"][1] if "parent" in trial else 0
        now = record(run)
        assert now["status"] == "finished"
        if old is None:
            missing += now["step"] - start
            continue
        assert now["run_id"] == old["run_id"]
        check_prefix(before, after, run, max(old["checkpoints"]))
        if old["status"] == "finished":
            assert after[run] == before[run]
        missing += now["step"] - max(old["checkpoints"])
    assert trained(before, after) == missing


def finished(folder, was):
    """The files of the runs that were finished from the first."""
    trials = was["trials"].items()
    return [files(folder / "runs" / name) for name, trial in trials if trial["state"] == "finished"]


def check_ids(call, folder, was):
    """A report has the trials under the ids that they had."""
    call("sweep", "report", folder)
    assert {row["id"] for row in csv.DictReader((folder / "results.csv").open())} == was["trials"].keys()


def check_executions(call, folder, settings):
    """A field that was one of the model's is an execution now: it sets no trials apart where losses are compared."""
    call("sweep", "report", folder, "--json", "report.json")
    document = json.loads(Path("report.json").read_text())
    executions = document["executions"]
    assert (executions["axes"], executions["verdict"]) == ({"remat": ["none", "dots"]}, "rounding")
    assert (executions["recipes"], len(document["settings"])) == (settings, settings)
    assert all(row["tokens_per_second"] > 0 for row in executions["executions"])


def states(call, folder):
    """How many trials of a sweep are in which state."""
    call("sweep", "status", folder, "--json", "status.json")
    states = json.loads(Path("status.json").read_text())["states"]
    return {name: count for name, count in states.items() if count}


def test_a_sweep_with_its_own_ledger_goes_on(place, call, commands, no_svg):
    folder, was = place("sweep_own") / "sweep_own", EXPECTED["sweeps"]["sweep_own"]
    assert states(call, folder) == {"finished": 4, "planned": 2}
    check_ids(call, folder, was)
    before, ended = lines(folder), finished(folder, was)
    call(*commands["sweep_own"])
    assert states(call, folder) == {"finished": 6}
    check_sweep(folder, was, before)
    after = lines(folder)
    call("sweep", "resume", folder)
    assert states(call, folder) == {"finished": 6}
    assert lines(folder) == after
    check_executions(call, folder, settings=3)
    check_ids(call, folder, was)
    assert finished(folder, was) == ended


def test_a_sweep_in_a_journal_goes_on(place, call, commands, no_svg):
    """Its storage and its data were moved with it, which `resume` is told."""
    root, was = place("sweep_journal"), EXPECTED["sweeps"]["sweep_journal"]
    folder = root / "sweep_journal"
    before, ended = lines(folder), finished(folder, was)
    call("sweep", "resume", folder, "--data", "data", "--storage", "journal:journal.log")
    assert states(call, folder) == {"finished": 4}
    check_sweep(folder, was, before)
    after = lines(folder)
    call(*(str(word).format(root=root) for word in commands["sweep_journal"]))
    assert states(call, folder) == {"finished": 4}
    assert lines(folder) == after
    check_ids(call, folder, was)
    assert finished(folder, was) == ended


@pytest.mark.long
def test_a_scaling_study_goes_on(place, call, commands, monkeypatch, no_svg):
    from experiments.commands.scaling import report

    root, was = place("ladder"), EXPECTED["sweeps"]["ladder/sweep"]
    folder = root / "ladder" / "sweep"
    assert states(call, folder) == {"finished": 2, "planned": 6}
    check_ids(call, folder, was)
    before, ended = lines(folder), finished(folder, was)
    with monkeypatch.context() as patch:  # its page is made once, below, with fewer resamples
        patch.setattr(report, "write_report", lambda folder: {})
        call(*commands["ladder"])
        check_sweep(folder, was, before)
        after = lines(folder)
        call(*commands["ladder"])
    assert lines(folder) == after
    assert states(call, folder) == {"finished": 8}
    assert finished(folder, was) == ended
    names = {trial["point"]["_name"]: name for name, trial in was["trials"].items()}
    table = list(csv.DictReader((root / "ladder" / "runs.csv").open()))
    assert {row["name"]: Path(row["run"]).name for row in table} == names
    call("scaling", "report", "ladder", "--bootstraps", 20)
    columns = ("--params", "params", "--tokens", "tokens", "--loss", "loss", "--bootstraps", 20)
    call("scaling", "fit", "ladder/runs.csv", *columns)


def test_a_sweep_with_dropout_keeps_its_ids_under_microbatches(place):
    """No id of a former run had them; the same command continues with it."""
    root = place("sweep_own")
    path = root / "sweep_own" / "sweep.json"
    content = json.loads(path.read_text())
    content["base"]["train_config"] |= {"dropout": True, "accumulate": 2}
    path.write_text(json.dumps(content))
    sweep = Sweep.read(root / "sweep_own")
    trials = plan_trials(sweep)
    assert {trial.execution.accumulate for trial in trials} == {2}
    assert not any("accumulate" in trial.recipe.identity for trial in trials)
    again = define(
        presets.get("tiny"),
        data=root / "data",
        folder=root / "sweep_own",
        steps=8,
        axes=sweep.axes,
        base={"d_model": 2, "num_heads": 1, "dropout": True, "accumulate": 2},
        batch_size=2,
        seq_len=32,
        evaluate_tokens=256,
    )
    assert [trial.id for trial in plan_trials(again)] == [trial.id for trial in trials]


def test_the_file_of_a_search_is_read_and_not_enumerated(tmp_path):
    (tmp_path / "space.py").write_text(
        "from experiments.sweep.space import branch, grid, uniform\n"
        'space = branch("optimizer", {"adamw": grid(beta2=uniform(0.9, 0.99)), "sgd": grid(clip_norm=[0.5, 1.0])})\n'
    )
    former = {"axes": [], "space_file": "space.py", "seeds": [0, 1], "sampler": "random"}
    request = TrialRequest.read(former, tmp_path)
    assert (request.listed, request.seeds) == ((), (0, 1))
    assert set(request.space(tmp_path).names) == {"optimizer", "beta2", "clip_norm"}

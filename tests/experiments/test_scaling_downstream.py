"""Downstream laws: a known truth comes back, the published ladder is predicted, and wrong tables are refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import cli
from experiments.scaling import fit_downstream, read_downstream
from experiments.scaling.downstream.chance import known_chance
from experiments.scaling.downstream.ensemble import Spread, TaskRuns
from experiments.scaling.downstream.fit import coverage
from experiments.scaling.downstream.held_out import by_size, sizes_of, stretch
from experiments.scaling.downstream.link import LINKS, fit_link
from experiments.scaling.downstream.report import write_downstream_page
from model.errors import InputError, UnknownNameError

LADDER = Path(__file__).parents[1] / "fixtures" / "scaling" / "bhagia2024_ladder.csv.gz"
SIZES = np.array([5e7, 1.2e8, 3e8, 8e8])
RATIOS = np.array([20.0, 60.0, 200.0])
TARGETS = [(2.5e9, 5e11), (5e9, 2e12)]


def truth(rng):
    """A law and a link: (N, D) → (bits per byte, accuracy)."""
    E, A, B = rng.uniform(0.3, 0.6), rng.uniform(60, 200), rng.uniform(150, 500)
    middle, slope, top = rng.uniform(0.8, 1.0), rng.uniform(5, 9), rng.uniform(0.85, 1.0)

    def results(params, tokens):
        bits = E + A * params**-0.32 + B * tokens**-0.3
        return bits, 0.25 + (top - 0.25) / (1 + np.exp(slope * (bits - middle)))

    return results


def simulated(tasks, rng, noise=0.006):
    """Rows of a ladder with the noise of a run in bits per byte and of 1,500 questions in accuracy."""
    rows = []
    for i in range(tasks):
        results = truth(rng)
        runs = [(n, n * r, 0) for n in SIZES for r in RATIOS] + [(n, d, 1) for n, d in TARGETS]
        for params, tokens, held_out in runs:
            bits, accuracy = results(params, tokens)
            bits, accuracy = bits * rng.lognormal(0, noise), rng.binomial(1500, accuracy) / 1500
            rows.append((params, tokens, f"task{i}", bits, accuracy, 0.25, held_out))
    names = ("params", "tokens", "task", "bits_per_byte", "accuracy", "chance", "held_out")
    return [dict(zip(names, row, strict=True)) for row in rows]


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ladder():
    return read_downstream(LADDER)


@pytest.fixture(scope="module")
def fitted(ladder):
    return fit_downstream(ladder, bootstraps=8)


def test_intervals_contain_a_known_truth(tmp_path):
    table = read_downstream(written(tmp_path / "runs.jsonl", simulated(10, np.random.default_rng(3))))
    fit = fit_downstream(table, bootstraps=8, widest=1.0)
    found = coverage(fit.predict_targets())
    assert (found.pairs, found.refused) == (20, 0)
    assert found.inside >= 0.9 * found.pairs
    assert found.mean_error < 0.05
    assert found.mean_width < 0.25


def test_the_published_ladder_is_predicted(fitted):
    """The runs of up to 3B predict HellaSwag and PIQA of OLMo 2 7B and 13B; what they cannot predict is refused."""
    predictions = fitted.predict_targets()
    found = coverage(predictions)
    assert found.pairs == 40
    assert found.refused <= 0.5 * found.pairs
    assert found.inside >= 0.85 * found.answered
    for prediction in predictions:
        measured = prediction.target.accuracy
        if prediction.task in ("hellaswag_val", "piqa_val"):
            assert prediction.refused is None
            assert abs(prediction.value - measured) <= 0.02
        if prediction.task in ("arc_challenge_test", "winogrande_val", "boolq_val"):
            assert "points wide" in prediction.refused
            assert prediction.low <= measured <= prediction.high
    within = fitted.held_out_coverage
    assert within.inside >= 0.9 * within.answered
    json.dumps(fitted.document(predictions), allow_nan=False)


def test_a_prediction_by_hand_and_its_page(fitted, tmp_path):
    near, far = (fitted.predict(n, 2e12, "hellaswag_val") for n in (7e9, 70e9))
    assert near.low < near.value < near.high
    assert far.width > near.width
    with pytest.raises(UnknownNameError, match="did you mean 'hellaswag_val'"):
        fitted.predict(7e9, 1e12, "hellaswag")
    two = {key: task for key, task in fitted.table.tasks.items() if key.task in ("hellaswag_val", "boolq_val")}
    short = replace(fitted, table=replace(fitted.table, tasks=two))
    write_downstream_page(tmp_path / "page.html", short, [near, short.predict(7e9, 2e12, "boolq_val")], "ladder")
    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert page.count("<svg") == 4
    assert "refused: the 95 % interval is" in page


def test_a_link_comes_back_from_its_own_values():
    bits = np.linspace(0.6, 1.4, 12)
    for link in LINKS:
        x = np.log(bits) if link.logarithmic else bits
        floor, top = 0.25 - 0.03 * link.free_floor, 1 - 0.2 * link.free_ceiling
        accuracy = floor + (top - floor) / (1 + np.exp(6 * (x - np.median(x))))
        fit = fit_link(link, bits, accuracy, np.ones((1, 12)), chance=0.25)
        np.testing.assert_allclose(fit.predict(bits[None])[0], accuracy, atol=1e-5)


def test_the_stretch_is_the_conformal_quantile_and_never_shortens():
    spread = Spread(np.array([0.5, 0.5]), np.array([0.4, 0.4]), np.array([0.7, 0.7]))
    np.testing.assert_allclose(spread.score(np.array([0.6, 0.35])), [0.5, 1.5])
    assert stretch(np.linspace(0.02, 2, 100)) == pytest.approx(1.92)
    assert stretch(np.full(50, 0.3)) == 1.0


def test_runs_of_about_one_size_are_one_group():
    params = np.array([1e8, 1.08e8, 1.16e8, 4e8, 9e8])
    assert sizes_of(params).tolist() == [1.16e8, 4e8, 9e8]
    assert [len(group) for group in by_size(TaskRuns(params, params, params, params))] == [3, 1, 1]


def spoiled(rows, **changes):
    return [row | {name: change(row) for name, change in changes.items()} for row in rows]


def same_runs(one, other):
    return all(np.allclose(one.tasks[k].runs.accuracy, other.tasks[k].runs.accuracy) for k in one.tasks)


def test_other_spellings_of_a_table_read_the_same(tmp_path):
    rows = simulated(2, np.random.default_rng(0))
    table = read_downstream(written(tmp_path / "a.jsonl", rows))
    assert [len(task.runs) for task in table.tasks.values()] == [12, 12]

    def read(changed, **settings):
        return read_downstream(written(tmp_path / "b.jsonl", changed), **settings)

    assert same_runs(table, read(spoiled(rows, accuracy=lambda row: 100 * row["accuracy"])))
    errors = [{k: v for k, v in row.items() if k != "accuracy"} | {"error_rate": 1 - row["accuracy"]} for row in rows]
    assert same_runs(table, read(errors))
    nats = [{k: v for k, v in row.items() if k != "bits_per_byte"} | {"loss": 3 * row["bits_per_byte"]} for row in rows]
    assert same_runs(table, read(nats))
    assert read(nats).unit == "nats per token"
    renamed = [{("size" if k == "params" else k): v for k, v in row.items()} for row in rows]
    assert same_runs(table, read(renamed, columns={"params": "size"}))
    twice = read([*rows, *rows[:3], rows[4] | {"accuracy": None}])
    assert same_runs(table, twice)
    assert len(twice.dropped) == 4
    assert any("exact duplicate of row 1" in row.reason for row in twice.dropped)
    for bits, accuracy in (("eval/{}_bpb", "eval/{}_acc"), ("{}/bpb", "{}/acc_norm"), ("eval/{}.bpb", "eval/{} acc")):
        wide = {}
        for row in rows:
            cells = {k: row[k] for k in ("params", "tokens", "held_out")} | {"other_bpb": 1.0}
            cells = wide.setdefault((row["params"], row["tokens"]), cells)
            cells |= {bits.format(row["task"]): row["bits_per_byte"], accuracy.format(row["task"]): row["accuracy"]}
        found = read(list(wide.values()))
        assert same_runs(table, found)
        assert "1 task left out, without bits per byte or without accuracy: other" in found.notes


def test_what_is_given_comes_before_what_is_found(tmp_path):
    rows = simulated(1, np.random.default_rng(0))
    table = read_downstream(written(tmp_path / "a.jsonl", rows))

    def read(columns=None, given=None, **changes):
        return read_downstream(written(tmp_path / "b.jsonl", spoiled(rows, **changes)), columns, **(given or {}))

    other = read({"error_rate": "wrong"}, wrong=lambda row: 1 - row["accuracy"], accuracy=lambda row: 0.5)
    assert same_runs(table, other)
    other = read({"loss": "gold"}, gold=lambda row: 2 * row["bits_per_byte"])
    assert other.unit == "nats per token"
    np.testing.assert_allclose(
        other.tasks["task0", None].runs.bits_per_byte, 2 * table.tasks["task0", None].runs.bits_per_byte
    )
    levels = read(given={"chance": {"task0": 0.3}}, chance=lambda row: row["accuracy"], ceiling=lambda row: 95)
    assert (levels.tasks["task0", None].chance, levels.tasks["task0", None].ceiling) == (0.3, 0.95)
    assert "taking the column 'model' for run" in read(model=lambda row: f"{row['params']}-{row['tokens']}").notes


def test_checkpoints_of_a_run_are_averaged_and_recipes_are_fitted_apart(tmp_path):
    rows = []
    for recipe in ("web", "books"):
        for seed in (1, 2):
            for params in (1e8, 3e8, 9e8):
                for step in range(1, 41):
                    tokens = 20 * params * step / 40
                    bits, accuracy = 1 + 0.01 * (seed - step), 0.3 + 0.005 * step + 0.01 * (step % 2)
                    rows.append((params, tokens, f"step{step}", seed, recipe, "piqa", bits, accuracy))
    names = ("params", "tokens", "step", "seed", "recipe", "task", "bpb", "acc")
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    table = read_downstream(written(tmp_path / "runs.jsonl", rows))
    assert [str(key) for key in table.tasks] == ["piqa (web)", "piqa (books)"]
    for task in table.tasks.values():
        assert (len(task.runs), task.chance) == (6, 0.5)
        last = [0.3 + 0.005 * step + 0.01 * (step % 2) for step in range(36, 41)]
        np.testing.assert_allclose(task.runs.accuracy, np.mean(last))
        assert task.checkpoint_noise == pytest.approx(np.std(last, ddof=1))
    assert "earlier checkpoints" in table.notes[-1]
    unseeded = [{k: v for k, v in row.items() if k != "seed"} for row in rows]
    with pytest.raises(InputError, match=r"several results at .* --columns.run, --columns.seed"):
        read_downstream(written(tmp_path / "unseeded.jsonl", unseeded))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": lambda row: 30 * row["accuracy"] * 10}, "an accuracy is from 0 to 1, or to 100 in per cent"),
        ({"accuracy": lambda row: row["accuracy"] * (100 if row["task"] == "task0" else 1)}, "in one unit"),
        (
            {"task": lambda row: "piqa", "accuracy": lambda row: row["accuracy"] * (1 if row["held_out"] else 100)},
            "seems to be a fraction; write all of it in one unit",
        ),
        ({"accuracy": lambda row: "good"}, "should be a number"),
        ({"accuracy": lambda row: None}, "no row is left to fit; row 1: accuracy is not"),
        ({"chance": lambda row: row["accuracy"]}, r"several values of chance, .* give one with --chance task0="),
        ({"run": lambda row: "one"}, "has 6 sizes"),
    ],
)
def test_a_wrong_table_is_refused_in_one_sentence(tmp_path, changes, message):
    rows = spoiled(simulated(2, np.random.default_rng(0)), **changes)
    with pytest.raises(InputError, match=message):
        read_downstream(written(tmp_path / "runs.jsonl", rows))


@pytest.mark.parametrize("missing", ["params", "task", "bits_per_byte", "accuracy"])
def test_a_missing_column_is_named(tmp_path, missing):
    rows = [{k: v for k, v in row.items() if k != missing} for row in simulated(1, np.random.default_rng(0))]
    with pytest.raises(InputError, match=missing):
        read_downstream(written(tmp_path / "runs.jsonl", rows))


def test_tasks_need_more_than_accuracy(tmp_path):
    rows = [{"params": 1e8, "tokens": 2e9, "arc_easy_acc": 0.4}]
    with pytest.raises(InputError, match="no task with both bits per byte and an accuracy among 'arc_easy_acc'"):
        read_downstream(written(tmp_path / "runs.jsonl", rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chance": lambda row: None}, "the chance level of 'task0' is not known"),
        ({"params": lambda row: min(row["params"], 1.2e8)}, "6 sizes|2 sizes|1 size"),
        ({"accuracy": lambda row: 0.25 + 1e-3 * (row["tokens"] % 7)}, "at chance within noise"),
        ({"accuracy": lambda row: 1 - row["accuracy"] / 2}, "accuracy does not rise"),
        ({"bits_per_byte": lambda row: 1 / row["bits_per_byte"]}, "does not fall with compute"),
    ],
)
def test_a_task_without_signal_is_refused_with_the_reason(tmp_path, changes, message):
    rows = [row for row in simulated(1, np.random.default_rng(0)) if not row["held_out"]]
    fit = fit_downstream(read_downstream(written(tmp_path / "runs.jsonl", spoiled(rows, **changes))), bootstraps=2)
    prediction = fit.predict(5e9, 1e12, "task0")
    assert prediction.value is None
    assert re.search(message, prediction.refused)


def test_runs_at_one_ratio_predict_no_other(tmp_path):
    """At a fixed D/N the laws are of compute alone, which says nothing about a model trained on far more tokens."""
    rng = np.random.default_rng(1)
    results = truth(rng)
    sizes = [(size, seed) for size in np.geomspace(5e7, 1.6e9, 6) for seed in range(2)]
    rows = []
    for params, seed in sizes:
        bits, accuracy = results(params, 20 * params)
        row = {"params": params, "tokens": 20 * params, "seed": seed, "task": "task0", "chance": 0.25}
        rows.append(row | {"bpb": bits * rng.lognormal(0, 0.005), "acc": rng.binomial(1500, accuracy) / 1500})
    fit = fit_downstream(read_downstream(written(tmp_path / "runs.jsonl", rows)), bootstraps=4, widest=1.0)
    near, far = fit.predict(3e9, 6e10, "task0"), fit.predict(3e9, 6e12, "task0")
    assert near.refused is None
    assert abs(near.value - results(3e9, 6e10)[1]) < 0.06
    assert "2000 tokens per parameter are far from the 20 … 20 of the runs" in far.refused


def test_chance_levels_are_known_by_name():
    known = {"mmlu_pro": 0.1, "MMLU-STEM": 0.25, "arc_easy:rc": 0.25, "race": 0.25, "trace": None}
    assert {name: known_chance(name) for name in known} == known


def test_the_command_prints_one_row_of_coverage_and_writes_every_number(tmp_path, monkeypatch, capsys):
    words = f"isoflop scaling downstream {LADDER} --tasks piqa_val --bootstraps 4 --json {tmp_path}/a.json".split()
    monkeypatch.setattr("sys.argv", [*words, "--report", f"{tmp_path}/a.html", "--params", "7e9", "--tokens", "1e12"])
    cli.main()
    printed = capsys.readouterr().out
    assert re.search(r"held-out runs +2 +0 % +100 %", printed)
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (len(document["predictions"]), document["measured"]["pairs"]) == (3, 2)
    assert "<svg" in (tmp_path / "a.html").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", [*words, "--chance", "piqa=half"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--chance piqa=half: write a task and a fraction" in capsys.readouterr().err

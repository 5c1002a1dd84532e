"""`isoflop scaling predict`: its answers, what they are made of, and the sentences for bad questions."""

import json
import re

import numpy as np
import pytest
import tyro

from experiments.commands.scaling.options import TableOptions
from experiments.commands.scaling.predict import predict
from experiments.scaling import fit_parametric
from experiments.scaling.forms.fit import fit_form
from experiments.scaling.serving import ServingCost, serving_optimum, training_rate
from experiments.scaling.use import compute_for_loss, optimal, planned_loss
from model import presets
from model.errors import InputError

DRAWS = 40


def columns():
    rng = np.random.default_rng(0)
    budgets = np.geomspace(1e18, 1e20, 4)
    N = (0.6 * (budgets[:, None] / 6) ** 0.45 * np.geomspace(1 / 4, 4, 7)).ravel()
    D = np.repeat(budgets, 7) / 6 / N
    return N, D, (1.7 + 400 * N**-0.34 + 410 * D**-0.28) * np.exp(rng.normal(0, 0.003, len(N)))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "runs.csv"
    rows = "".join(f"{n!r},{d!r},{loss!r}\n" for n, d, loss in zip(*map(np.ndarray.tolist, columns()), strict=True))
    path.write_text("params,tokens,loss\n" + rows)
    return path


@pytest.fixture(scope="module")
def law():
    return fit_parametric(*columns(), bootstraps=DRAWS)


def asked(table, tmp_path, *arguments, **settings):
    """The document of one call."""
    out = tmp_path / "answer.json"
    predict(table, *arguments, bootstraps=DRAWS, json=out, **settings)
    return json.loads(out.read_text())


def bench(path, name, seconds, **more):
    cells = [
        {"batch": 1, "kv_heads": None, "time_per_output_token_seconds": 1.0},
        {"batch": 8, "kv_heads": None, "time_per_output_token_seconds": seconds},
        {"batch": 64, "kv_heads": None, "error": "out of memory"},
    ]
    path.write_text(json.dumps({"config": presets.get(name).to_dict(), "cells": cells} | more))
    return path


def test_every_question_in_one_call(table, law, tmp_path, capsys):
    document = asked(
        table, tmp_path, flops=(1e19, 1e22), target_loss=(2.3,), params=1e9, tokens=2e10, serve_tokens=1e12, level=80
    )
    assert document["level"] == 80
    best = document["optimal"]
    assert [next(iter(answer.values()))["flops"] for answer in best] == [1e19, 1e22]
    assert best[1]["parametric"] == optimal({"parametric": law}, 1e22, 80)["parametric"].to_dict()
    assert {"parametric", "isoflop", "isoflop.skewed", "isoflop.parabola"} <= set(best[0])
    assert document["compute_for_loss"] == [compute_for_loss(law, 2.3, 80).to_dict()]
    forms = document["planned"][0].pop("forms")
    assert document["planned"] == [planned_loss(law, 1e9, 2e10, 80).to_dict()]
    assert forms["losses"]["chinchilla"] == pytest.approx(document["planned"][0]["loss"], rel=1e-6)
    assert forms["losses"]["kaplan"] == pytest.approx(
        fit_form("kaplan", dict(zip(("params", "tokens", "loss"), columns(), strict=True))).predict(
            params=1e9, tokens=2e10
        )
    )
    served = [serving_optimum(law, served_tokens=1e12, level=80, **goal) for goal in _goals()]
    assert document["serving"] == [one.to_dict() for one in served]
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert printed.count("FAR: ") == 4
    assert "within the compute of the fit" in printed
    assert re.search(
        r"by form of law, fitted to 28 runs: chinchilla \d\.\d{4}, .*kaplan \d\.\d{4} on held-out budgets ", printed
    )
    assert "2·N FLOPs, as no measurement was given" in printed


def _goals():
    return [{"training_flops": 1e19}, {"training_flops": 1e22}, {"target": 2.3}]


def test_measured_costs_come_from_bench_files(table, tmp_path, capsys):
    files = (bench(tmp_path / "s.json", "gpt2-small", 0.004), bench(tmp_path / "l.json", "gpt2-large", 0.02))
    train = tmp_path / "train.json"
    rows = [{"lanes": 4, "flops_6nd_per_second": 9e14}, {"lanes": 1, "flops_6nd_per_second": 5e14}]
    train.write_text(json.dumps({"rows": rows}))
    document = asked(table, tmp_path, flops=(1e20,), serve_tokens=1e13, decode=files, train=train)
    (answer,) = document["serving"]
    cost = ServingCost.measured(files, 5e14)
    assert answer["unit"] == "seconds"
    assert answer["training_cost"] == pytest.approx(6 * answer["params"] * answer["tokens"] / 5e14)
    assert answer["serving_cost"] == pytest.approx(1e13 * cost(answer["params"]))
    assert float(cost(cost.measured_params[0])) == pytest.approx(0.004 / 8)
    assert "hours" in capsys.readouterr().out
    same = asked(table, tmp_path, flops=(1e20,), serve_tokens=1e13, decode=files, train_rate=5e14)
    assert same["serving"] == document["serving"]
    train.write_text(json.dumps({"contenders": [{"name": "isoflop", "flops_6nd_per_second": 3e12}, {"name": "torch"}]}))
    assert training_rate(train) == 3e12


def test_a_study_folder_leaves_out_what_is_held_out(table, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    lines = table.read_text().splitlines()
    rows = [line + f",{index >= 22}" for index, line in enumerate(lines[1:], start=1)]
    (study / "runs.csv").write_text("\n".join([lines[0] + ",held_out", *rows]))
    question = {"params": 1e9, "tokens": 2e10}
    fitted, every = asked(study, tmp_path, **question), asked(study, tmp_path, all_runs=True, **question)
    assert (fitted["rows"], every["rows"]) == (21, 28)
    assert every["planned"] == asked(table, tmp_path, **question)["planned"]
    assert fitted["planned"][0]["extrapolation"]["flops_over_largest"] > 2


def test_the_command_line_knows_columns_by_other_names(table, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text(table.read_text().replace("params,tokens,loss", "N,Training Tokens,val"))
    arguments = [str(other), "--columns.loss", "val", "--params", "1e9", "--tokens", "2e10", "--bootstraps", "20"]
    tyro.cli(predict, args=arguments)
    captured = capsys.readouterr()
    assert "taking the column 'N' for params, 'Training Tokens' for tokens" in captured.err
    assert "loss 2.5" in captured.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no question"),
        ({"params": 1e9}, "takes both --params and --tokens"),
        ({"flops": (-1e20,)}, r"--flops=-1e\+20 must be a number above 0"),
        ({"target_loss": (float("nan"),)}, "--target-loss=nan must be a number above 0"),
        ({"target_loss": (1.0,)}, "at or below the law's floor E=1"),
        ({"flops": (1e20,), "level": 100}, "--level=100 must be a number above 0 and below 100"),
        ({"serve_tokens": 1e12}, "there is no question"),
        ({"params": 1e9, "tokens": 1e10, "serve_tokens": 1e12}, "add --flops or --target-loss"),
        ({"flops": (1e20,), "serve_tokens": -1.0}, "--serve-tokens=-1.0 must be a number of at least 0"),
        ({"flops": (1e20,), "train_rate": 1e14}, "add --serve-tokens"),
        ({"flops": (1e20,), "serve_tokens": 1e12, "train_rate": 1e14}, "go with --decode"),
        ({"flops": (1e20,), "serve_tokens": 1e12, "decode": ("good",)}, "add --train or --train-rate"),
        ({"flops": (1e20,), "serve_tokens": 1e12, "decode": ("absent",), "train_rate": 1e14}, "cannot read .*absent"),
        ({"flops": (1e20,), "serve_tokens": 1e12, "decode": ("other",), "train_rate": 1e14}, "it has no 'cells'"),
        ({"flops": (1e20,), "serve_tokens": 1e12, "decode": ("good",), "train": "good"}, "bench train --json"),
        (
            {"flops": (1e20,), "serve_tokens": 1e12, "decode": ("good",), "train_rate": 1e14, "batch": 3},
            "no measured cell of batch 3",
        ),
    ],
)
def test_bad_questions_get_one_sentence(table, tmp_path, settings, message):
    bench(tmp_path / "good", "gpt2-small", 0.004)
    (tmp_path / "other").write_text(json.dumps({"config": {}}))
    if "decode" in settings:
        settings = settings | {"decode": tuple(tmp_path / name for name in settings["decode"])}
    if "train" in settings:
        settings = settings | {"train": tmp_path / settings["train"]}
    with pytest.raises(InputError) as error:
        predict(table, bootstraps=5, **settings)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


def test_bad_tables_get_one_sentence(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        predict(tmp_path / "absent", flops=(1e20,))
    with pytest.raises(InputError, match=r"folder without runs\.csv"):
        predict(tmp_path, flops=(1e20,))
    (tmp_path / "one.csv").write_text("params,tokens,loss\n1e6,1e7,3.0\n")
    with pytest.raises(InputError, match=r"determines no scaling law: 1 usable run cannot"):
        predict(tmp_path / "one.csv", flops=(1e20,))


def test_options_hand_every_column_on(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("params,active,D,U,final_loss,repeated\n8B,1B,1.4T,200B,2.1,true\n4B,1B,20B,20B,2.6,false\n")
    options = TableOptions(unique_tokens="U", active_params="active", keep_repeated=True)
    table = options.read(path)
    np.testing.assert_array_equal(table.tokens, [1.4e12, 2e10])
    np.testing.assert_array_equal(table.unique_tokens, [2e11, 2e10])
    np.testing.assert_array_equal(table.active_params, [1e9, 1e9])


def test_a_question_without_an_answer_does_not_take_the_others_with_it(table, law, tmp_path, isoflop):
    out = tmp_path / "answers.json"
    code, said, error = isoflop(
        *("scaling", "predict", table, "--flops", 1e19, -1e19, "--target-loss", 2.3, 1.0, 0, "--params", 1e9),
        *("--tokens", 2e10, "--serve-tokens", 1e12, "--bootstraps", DRAWS, "--json", out),
    )
    assert (code, error) == (0, "")
    document = json.loads(out.read_text())
    reached, below, zero = document["compute_for_loss"]
    assert reached == compute_for_loss(law, 2.3).to_dict()
    assert (below["target"], below["flops"], below["params"], below["interval"]) == (1.0, None, None, None)
    assert "at or below the law's floor E=1.7" in below["refused"]
    assert (zero["target"], zero["refused"]) == (0.0, "--target-loss=0.0 must be a number above 0")
    assert document["optimal"][0]["parametric"] == optimal({"parametric": law}, 1e19)["parametric"].to_dict()
    assert {one["refused"] for one in document["optimal"][1].values()} == {"--flops=-1e+19 must be a number above 0"}
    assert [answer["params"] is None for answer in document["serving"]] == [False, True, False, True, True]
    assert document["planned"][0]["loss"] == planned_loss(law, 1e9, 2e10).loss
    assert said.count("refused:") == 6
    assert "Loss 1 refused: a loss of 1 is at or below" in said


def test_where_no_question_has_an_answer_the_exit_code_is_2_and_every_reason_is_said(table, tmp_path, isoflop):
    out = tmp_path / "answers.json"
    call = ("scaling", "predict", table, "--bootstraps", 5, "--json", out, "--target-loss")
    code, _, error = isoflop(*call, 1.0, -1)
    assert code == 2
    assert error.strip().splitlines() == [error.strip()]
    assert "a loss of 1 is at or below" in error
    assert "--target-loss=-1.0 must be a number above 0" in error
    assert not out.exists()


def test_valleys_answer_where_the_law_is_refused(tmp_path, isoflop):
    """Two budgets of four sizes each carry valleys; the law needs more runs than eight with its outliers screened."""
    N = np.geomspace(1e8, 1e9, 4)
    rows = [f"{n},{C / 6 / n},{2 + 0.1 * np.log(n / 3e8) ** 2}" for C in (1e19, 2e19) for n in N]
    path, out = tmp_path / "runs.csv", tmp_path / "answers.json"
    path.write_text("params,tokens,loss\n" + "\n".join(rows))
    isoflop("scaling", "predict", path, *("--flops", 1e20, "--target-loss", 1.9, "--bootstraps", 20, "--json", out))
    document = json.loads(out.read_text())
    assert "parametric" not in document["optimal"][0]
    assert document["optimal"][0]["isoflop"]["params"] == pytest.approx(3e8, rel=0.01)
    assert "only the parametric law predicts a loss" in document["compute_for_loss"][0]["refused"]


def test_a_budget_below_all_runs_is_not_within_them(table, tmp_path, capsys):
    asked(table, tmp_path, flops=(5e17, 5e19, 1e30))
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "the compute is below that of the fit: 0.5 of its smallest" in printed
    assert "within the compute of the fit (0.5 of its largest)" in printed
    assert "FAR: 1e+10 times the largest compute of the fit" in printed


def test_more_tokens_than_any_model_could_serve_are_refused(table, tmp_path):
    document = asked(table, tmp_path, target_loss=(2.3,), serve_tokens=1e300)
    assert document["compute_for_loss"][0]["flops"] > 1e20
    assert document["serving"][0]["params"] is None
    assert "its training has no end; ask for fewer tokens" in document["serving"][0]["refused"]

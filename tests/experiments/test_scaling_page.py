"""The whole analysis of a table, its page and its tables; and what a table is refused for."""

import csv
import json
import re

import numpy as np
import pytest

from experiments.scaling.analysis import analyse
from experiments.scaling.known_laws import CASES, TRUTH, simulate
from experiments.scaling.report import write_scaling_page
from experiments.scaling.rows.table import clean
from experiments.scaling.rows.tables import write_tables

SECTIONS = ("exponents", "valleys", "optimal", "contours", "residuals", "draws", "forms", "held-out", "conventions")


@pytest.fixture(scope="module")
def runs():
    """Simulated runs of one law: columns params, tokens, loss."""
    return simulate(CASES[0], 0)[0]


@pytest.fixture(scope="module")
def analysis(runs):
    test = {"name": "b7", "params": 1e9, "tokens": 2e10, "repeated": False, "loss": 2.5, "interval": [2.4, 2.6]}
    test |= {"measured": 2.55, "error": 0.05, "relative_error": 0.02, "inside": True}
    optimum = {"params": 1e9, "tokens": 2e10, "loss": 2.5, "intervals": None}
    budget = {"flops": 1.2e20, "optima": {"parametric": optimum}, "measured": {"refused": "one model size"}}
    held_out = {"written": "2026-01-02T03:04:05Z", "runs": [test], "budgets": [budget], "inside": 1}
    return analyse(clean(**runs), held_out=held_out | {"mean_relative_error": 0.02}, bootstraps=20)


def test_every_estimator_stands_side_by_side(analysis):
    rows = {row.estimator: row for row in analysis.exponents}
    assert set(rows) == {"parametric", "isoflop", "isoflop.skewed", "isoflop.parabola"}
    for row in rows.values():
        assert row.a + row.b == pytest.approx(1, abs=1e-6)
        assert row.a == pytest.approx(TRUTH["a"], abs=0.05)
        assert row.intervals["a"][0] < row.a < row.intervals["a"][1]
    document = json.loads(json.dumps(analysis.document(), allow_nan=False))
    for name in ("schema_version", "convention", "parametric", "isoflop", "dropped", "refused"):
        assert name in document, "what a program reads stays where it was"
    assert document["forms"]["scores"][0]["form"] == "chinchilla"
    assert document["envelope"] is None, "no curves were given, which is no refusal"
    assert "envelope" not in document["refused"]


def test_the_page_shows_all_of_it_and_fetches_nothing(analysis, tmp_path):
    write_scaling_page(tmp_path / "page.html", analysis, "a <table>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for section in SECTIONS:
        assert f'id="{section}"' in page
    assert page.count("<figure") == 6
    assert "Not shown" not in page
    assert "a &lt;table&gt;" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", page)


def test_a_phone_shows_every_panel_with_text_that_can_be_read(analysis, phone_figures, tmp_path):
    write_scaling_page(tmp_path / "page.html", analysis, "runs")
    assert len(phone_figures) == 1 + 2 + 1 + 3 + 2 + 2, "valleys, N* and D*, contours, residuals, draws, held out"


def test_what_cannot_be_shown_is_said(no_svg, tmp_path):
    rng = np.random.default_rng(0)
    params, tokens = np.exp(rng.uniform(np.log(1e6), np.log(1e9), 40)), np.exp(rng.uniform(18, 25, 40))
    loss = TRUTH["E"] + TRUTH["A"] * params ** -TRUTH["alpha"] + TRUTH["B"] * tokens ** -TRUTH["beta"]
    scattered = clean(params, tokens, loss * np.exp(rng.normal(0, 0.003, 40)))
    analysis = analyse(scattered, bootstraps=5, forms=())
    assert "isoflop" in analysis.refused
    write_scaling_page(tmp_path / "page.html", analysis, "scattered runs")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "refused.</b>" in page
    assert "No valley was found" in page


def test_a_prediction_names_the_curve_that_made_it(analysis, tmp_path):
    """One of before the curve was written down used the parabola."""
    from dataclasses import replace

    optimum = {"params": 1e9, "tokens": 2e10, "loss": None, "intervals": None}
    for valleys, name in ((None, "parabola"), ({"method": "spline", "smoothing": 1.0}, "spline")):
        budget = analysis.held_out["budgets"][0] | {"optima": {"isoflop": optimum}}
        held_out = analysis.held_out | {"budgets": [budget], "valleys": valleys}
        write_scaling_page(tmp_path / "page.html", replace(analysis, held_out=held_out), "runs")
        assert f"predicted, IsoFLOP valleys, {name}" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_estimates_outside_their_own_intervals_are_warned_of(analysis):
    from dataclasses import replace

    assert not [row for row in analysis.warnings if "its own" in row.text]
    skewed = replace(analysis.fits.valleys["skewed"], a=0.9)
    valleys = replace(analysis.fits.isoflop, b=0.1)
    valleys.__dict__["draws"] = analysis.fits.isoflop.draws
    skewed.__dict__["draws"] = analysis.fits.valleys["skewed"].draws
    parametric = replace(analysis.fits.parametric)
    parametric.__dict__["draws"] = analysis.fits.parametric.draws + np.array([1.0, 0, 0, 0, 0])
    others = analysis.fits.valleys | {"skewed": skewed}
    fits = replace(analysis.fits, parametric=parametric, isoflop=valleys, valleys=others)
    found = replace(analysis, fits=fits)
    said = {(row.about, row.text.split(" = ")[0]) for row in found.warnings if "its own" in row.text}
    assert said == {("parametric", "E"), ("isoflop", "b"), ("isoflop.skewed", "a")}
    assert any("its own 95 %" in text for text in found.document()["isoflop"]["warnings"])


def test_estimators_that_do_not_meet_are_said_to(analysis):
    from dataclasses import replace

    rows = [row for row in analysis.exponents if row.estimator == "isoflop"]
    assert not [warning for warning in analysis.warnings if warning.about == "estimators"]
    other = replace(analysis.fits.isoflop, a=rows[0].a + 0.3)
    other.__dict__["draws"] = analysis.fits.isoflop.draws + np.array([0, 0.3, 0, -0.3])
    apart = replace(analysis, fits=replace(analysis.fits, isoflop=other))
    texts = [warning.text for warning in apart.warnings if warning.about == "estimators"]
    assert texts
    assert "intervals do not meet" in texts[0]


def test_the_same_numbers_as_tables(analysis, tmp_path):
    names = {path.stem for path in write_tables(tmp_path, analysis)}
    assert names == {*("exponents", "fitted", "draws", "valley_draws", "optima", "forms", "form_values", "held_out")}
    with open(tmp_path / "fitted.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(analysis.fits.parametric.table)
    row = {name: float(value) for name, value in rows[3].items()}
    assert np.log(row["loss"] / row["predicted"]) == pytest.approx(row["residual"], abs=1e-12)


def test_gross_outliers_are_named_and_decide_nothing(runs):
    spoiled = {name: values.copy() for name, values in runs.items()}
    spoiled["loss"][[7, 50]] *= (1.3, 1.5)  # the second in the budget that the choice of form holds out
    spoiled["loss"][11] = np.nan
    analysis = analyse(clean(**spoiled), bootstraps=5, forms=("chinchilla", "no-floor"), screen=True)
    rows = {(row.row, row.estimator) for row in analysis.left_out}
    assert {(12, "all"), (8, "parametric"), (51, "parametric"), (8, "isoflop"), (51, "isoflop")} <= rows
    chosen = analysis.document()["forms"]
    assert chosen["winner"] == "chinchilla"
    assert chosen["held_out"]["runs"] == len(analysis.fits.parametric.table)
    assert chosen["fits"]["chinchilla"]["values"]["alpha"] == pytest.approx(analysis.fits.parametric.alpha, rel=1e-3)


def test_an_optimum_beyond_every_run_is_warned_of(analysis):
    from dataclasses import replace

    fit = analysis.fits.parametric
    assert not [row for row in analysis.warnings if "is outside" in row.text]
    small = fit.table.params < np.median(fit.table.params) / 3
    table = clean(fit.table.params[small], fit.table.tokens[small], fit.table.loss[small])
    beyond = replace(analysis, fits=replace(analysis.fits, parametric=replace(fit, table=table)))
    texts = [row.text for row in beyond.warnings if row.about == "parametric"]
    assert any("at the largest compute" in text and "N* = " in text for text in texts)


@pytest.mark.slow
def test_a_folder_of_runs_gets_its_page(isoflop, no_svg, runs, tmp_path):
    """Also without a design beside the runs: other counts of N are found by name, and held-out rows stay out."""
    with open(tmp_path / "runs.csv", "w", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("params", "tokens", "loss", "held_out", "params_total", "params_non_embedding"))
        last = len(runs["loss"]) - 3
        for i, (n, d, loss) in enumerate(zip(*runs.values(), strict=True)):
            writer.writerow((n, d, loss, i >= last, n, n - 0.1 * n**0.5))
    code, said, _ = isoflop("scaling", "report", tmp_path, "--bootstraps", 5)
    assert code == 0
    assert "3 held-out rows did not enter" in said
    document = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert len(document["conventions"]["rows"]) == 2
    assert document["held_out"] is None
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"rows {last + 1}–{last + 3}" in page
    assert (tmp_path / "tables" / "conventions.csv").exists()


GOOD = "N,D,val_loss\n" + "".join(
    f"{n},{d},{2 + 400 * n**-0.34 + 400 * d**-0.28}\n" for n in (1e6, 3e6) for d in (1e8,)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("N,D\n1,2\n", "has no column 'loss'"),
        (GOOD.replace("1000000.0", "many"), "but holds 'many'"),
        ("N,D,loss\n1e6,1e8,-2.0\n", "1 row was dropped, such as row 1: loss is not positive (-2)"),
        ("N,D,loss\n1e6,1e8,2.0\n", "parametric: "),
        ("N,D,loss\n" + 6 * "1e6,1e8,2.0\n", "parametric: "),
        (GOOD, "parametric: "),
        ("N,D,loss\n" + "".join(f"1e6,{d}e8,{3 - d / 10}\n" for d in range(1, 9)), "parametric: "),
    ],
    ids=["empty", "no column", "text", "negative", "one row", "identical rows", "two rows", "one size"],
)
def test_a_table_that_carries_nothing_is_refused_in_one_sentence(isoflop, tmp_path, text, sentence):
    file = tmp_path / "runs.csv"
    file.write_text(text)
    code, _, said = isoflop("scaling", "fit", file, "--bootstraps", 5, "--report", tmp_path / "page.html")
    assert code == 2
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "page.html").exists()

"""Every run enters a fit unless screening is requested; what screening leaves out is listed beside the whole answer."""

import json

import numpy as np
import pytest

from experiments.scaling import fit_isoflop, fit_parametric
from experiments.scaling.fit import fit_both, parametric_warnings
from experiments.scaling.known_tables import TableKind, simulate
from experiments.scaling.rows.table import clean

TRUTH = {"E": 1.82, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}


@pytest.fixture(scope="module")
def heavy_tailed():
    """A table of 120 runs in nine budgets with noise of 0.3 %; five of them, the largest among them, are 3 % off."""
    rng = np.random.default_rng(3)
    flops = np.repeat(np.geomspace(1e19, 1e22, 8), 15)
    params = 0.12 * flops**0.5 * np.exp(rng.uniform(-1.2, 1.2, 120))
    tokens = flops / 6 / params
    loss = TRUTH["E"] + TRUTH["A"] * params ** -TRUTH["alpha"] + TRUTH["B"] * tokens ** -TRUTH["beta"]
    loss *= np.exp(rng.normal(0, 0.003, 120))
    loss[[119, 110, 60, 33, 7]] *= 1.03
    return {"params": params, "tokens": tokens, "loss": loss}


def test_by_default_the_function_and_the_command_use_every_run(heavy_tailed, isoflop, tmp_path):
    fit = fit_parametric(**heavy_tailed, bootstraps=10)
    assert (len(fit.table), fit.outliers) == (120, [])
    path = tmp_path / "runs.csv"
    rows = zip(*heavy_tailed.values(), strict=True)
    path.write_text("params,tokens,loss\n" + "".join(f"{n!r},{d!r},{loss!r}\n" for n, d, loss in map(tuple, rows)))
    path.write_text(path.read_text().replace("np.float64(", "").replace(")", ""))
    for extra in ((), ("--screen",)):
        code, out, err = isoflop(
            "scaling", "fit", path, "--forms", "chinchilla", "no-floor", "--bootstraps", 10, "--json",
            tmp_path / "fit.json", *extra,
        )  # fmt: skip
        assert code == 0, err
        document = json.loads((tmp_path / "fit.json").read_text())
        assert document["dropped"] == []
        whole = document["unscreened"]["parametric"] if extra else document["parametric"]
        assert (whole["rows"], whole["outliers"]) == (120, [])
        assert [whole[name] for name in ("E", "a")] == pytest.approx([fit.E, fit.a], rel=1e-12)
        if extra:
            assert document["parametric"]["rows"] == 115
            assert "parametric law, with every run" in out
            assert "With every run: L = " in out
        else:
            assert document["unscreened"] is None
            assert document["isoflop"]["outliers"] == []
            assert "5 of 120 runs are off the law by more than noise explains" in out


def test_screening_finds_the_runs_that_are_wrong(heavy_tailed):
    fit = fit_parametric(**heavy_tailed, screen=True)
    wrong = {float(heavy_tailed["params"][i]) for i in (119, 110, 60, 33, 7)}
    assert {run.params for run in fit.outliers} == wrong
    assert fit.a == pytest.approx(TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]), abs=0.01)
    assert not any("--screen" in text for text in parametric_warnings(fit, fit.outliers))


@pytest.mark.parametrize("budgets, sizes, span, drift", [(9, 9, 30, 1.2), (12, 5, 30, 1.2), (6, 9, 4, 0)])  # noqa: PT006
def test_a_table_without_noise_has_no_outlier(budgets, sizes, span, drift):
    """No cubic follows a law to the walls of a wide window, and what it misses there is not noise."""
    table, _ = simulate(TableKind("clean", budgets=budgets, sizes=sizes, span=span, drift=drift, noise=0.0), 0)
    fits = fit_both(clean(**table), bootstraps=1, screen=True)
    assert fits.parametric_outliers == []
    assert fits.isoflop is not None
    for fit in (fits.isoflop, *fits.valleys.values()):
        assert fit.outliers == []
        assert not any("too few to say" in one.reason for one in fit.rejected)


def test_exact_parabolas_have_no_outlier_either():
    flops = np.repeat(np.geomspace(1e15, 1e18, 6), 9)
    best = 0.3 * flops**0.47
    params = best * np.tile(np.geomspace(1 / 8, 8, 9), 6)
    loss = 2 + 50 * flops**-0.1 + 0.06 * np.log(params / best) ** 2
    fit = fit_isoflop(params=params, tokens=flops / 6 / params, loss=loss, screen=True)
    assert fit.outliers == []
    assert fit.a == pytest.approx(0.47, rel=1e-6)

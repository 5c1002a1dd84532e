"""The sweep's page on recorded sweeps with a known surface: it says what is there, what is not, and fetches nothing."""

import html
import itertools
import json
import re

import numpy as np
import pytest

from experiments.report import sweep_page
from experiments.sweep.analysis import analyse
from experiments.sweep.overlay import apply
from experiments.sweep.results import collect, read_results, write_tables
from experiments.sweep.row import Row
from experiments.sweep.trial import Setting, Trial
from model import presets
from train import HParams, TrainConfig

STEPS = 60
BASE = Setting(presets.get("tiny"), TrainConfig(batch_size=4, seq_len=32), HParams(), STEPS)
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
GRID = {"learning_rate": RATES, "weight_decay": [0.0, 0.01, 0.1], "warmup_fraction": [0.02, 0.1]}
TOKENS = 128


def product(axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def surface(point, best=4e-3):
    """Known: a parabola in log learning rate, a slope in weight decay, nothing in the warm-up."""
    rate = point.get("learning_rate", best)
    width = point.get("d_model", 32)
    return 3 + 0.1 * np.log(rate / best) ** 2 + 0.3 * point.get("weight_decay", 0.0) - 0.05 * np.log2(width / 32)


def record(folder, points, *, seeds=3, noise=0.004, loss=surface, fate=None, curves=True, seed=0, **about):
    """The results of a sweep as a ledger would have them, with the runs' metrics beside them.

    fate: point, seed → a state, and the last loss or None; otherwise every trial has finished.
    """
    rng, rows = np.random.default_rng(seed), []
    for point, number in itertools.product(points, range(seeds)):
        point = point | {"seed": number}
        trial = Trial(apply(BASE, point), point, "ab" * 32)
        final = float(loss(point) + noise * rng.standard_normal())
        state = fate(point) if fate else "finished"
        done = {"finished": STEPS, "pruned": 20, "diverged": 14, "running": 20}.get(state, 0)
        rungs = {step: final + 8 / step for step in (20, STEPS) if step < done or step == done != STEPS}
        rungs |= {STEPS: final} if state == "finished" else {}
        rungs = {} if state == "diverged" else rungs
        run = f"runs/{trial.id}"
        per_token = 6e3 * trial.setting.config.d_model**2
        facts = {"run": run, "steps": done, "tokens": done * TOKENS, "flops_6nd": done * TOKENS * per_token}
        facts |= {"flops_exact": 1.1 * facts["flops_6nd"], "seconds": 3.0, "compile_seconds": 0.5, "worker": "w"}
        facts |= {"claimed_at": 10.0 * len(rows), "ended_at": 10.0 * len(rows) + 4}
        values = None
        if state == "finished":
            fast = 4000 / trial.setting.config.d_model
            values = tuple(
                {"loss": final, "tokens_per_second": fast}[name] for name in about.get("objectives", ["loss"])
            )
        rows.append(Row(len(rows), trial, state, rungs, values, facts if done else {}))
        if curves and done:
            write_metrics(folder / run, done, final, per_token, diverged=state == "diverged", rng=rng)
    return collect(folder, rows, **about)


def write_metrics(run, steps, final, per_token, *, diverged, rng):
    run.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        value = final + 5 / step**0.8 - 5 / STEPS**0.8 + 0.02 * rng.standard_normal()
        value = None if diverged and step == steps else value
        tokens = TOKENS * step
        lines.append({"step": step, "tokens": tokens, "flops_6nd": tokens * per_token, "loss": value})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def words(text):
    text = re.sub(r"<(style|svg|script).*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", text)))


def page(results):
    path = results.folder / "report.html"
    sweep_page.write_sweep_page(path, results, analyse(results))
    return path.read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch):
    """Figures are made but not turned into SVG, which takes most of the time."""
    monkeypatch.setattr(sweep_page, "inline", lambda figure, label: "[figure]")
    few = lambda *arguments: importances(*arguments, draws=3)
    from experiments.sweep import analysis
    from experiments.sweep.importance import importances

    monkeypatch.setattr(analysis, "importances", few)


@pytest.mark.slow
def test_the_page_of_a_whole_sweep(tmp_path):
    text = page(record(tmp_path, product(GRID)))
    said = words(text)
    assert "learning_rate=0.004, weight_decay=0" in said
    assert "cannot be told apart from it" in said, "the warm-up changes nothing"
    assert text.count("<svg") == 5
    assert len(text) < 3e6
    assert "Still running" not in said
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    assert "@import" not in text
    assert text.count("<script>") == 1

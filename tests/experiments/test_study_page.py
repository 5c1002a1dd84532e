"""The study's page: it says what was found, or why nothing was; it fetches nothing and trusts no text."""

import html.parser
import itertools
import re
import tomllib

import numpy as np
import pytest

from experiments.scaling.fit import fit_both
from experiments.scaling.rows.table import read_table
from experiments.scaling.rows.tables import write_csv
from experiments.scaling.study.design import Design
from experiments.study import report as study_page
from experiments.study.command_lines import commands
from experiments.sweep.analysis.summary import summarize
from model import presets

FITS = {}


def few_draws(table):
    """`fit_both` with a small bootstrap, once per table."""
    key = (table.loss.tobytes(), table.params.tobytes())
    if key not in FITS:
        FITS[key] = fit_both(table, bootstraps=40)
    return FITS[key]


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_svg):
    monkeypatch.setattr(study_page, "fit_both", few_draws)


@pytest.fixture
def undrawn(monkeypatch):
    """Nor are figures made, for what is said beside them."""
    said = lambda label, draw, reason=None: {"svg": None if reason else "[figure]", "reason": reason}
    monkeypatch.setattr(study_page, "drawn", said)
    monkeypatch.setattr(study_page, "drawn_twice", said)


def ladder():
    """Five sizes at each of four budgets, on a law whose optimum is 20 tokens per parameter; one run is held out."""
    rng = np.random.default_rng(0)
    rows = []
    alike = {"d_model": 16, "epochs": 0.5, "learning_rate": 0.01, "repeated": False, "status": "finished"}
    for index, budget in enumerate([1e12, 2e12, 4e12, 8e12, 16e12]):
        for factor in np.sqrt(2.0) ** np.arange(-2, 3):
            params = round(np.sqrt(budget / 120) * factor)
            steps = round(budget / (6 * params * 1024))
            loss = 1.7 + 20 * params**-0.35 + 20 * (1024 * steps / 20) ** -0.35
            rows.append(
                alike
                | {
                    "name": f"b{index + 1}-{params}",
                    "budget": index,
                    "budget_flops": budget,
                    "held_out": index == 4,
                    "params": params,
                    "steps": steps,
                    "tokens": 1024 * steps,
                    "flops_6nd": 6.0 * params * 1024 * steps,
                    "loss": float(loss * np.exp(0.001 * rng.standard_normal())),
                    "run": f"sweep/runs/b{index + 1}-{params}",
                    "seconds": 12.5,
                }
            )
    return rows[:21]


def fitted(rows, folder):
    """The document of the fits of these rows, whose table is left in the folder."""
    write_csv(folder / "ladder" / "runs.csv", rows)
    return few_draws(read_table(folder / "ladder" / "runs.csv")).document()


def made(folder):
    rows = ladder()
    rates, betas = [0.005, 0.01, 0.02, 0.04], [0.95, 0.99]
    trials = [
        {"learning_rate": rate, "beta2": beta, "seed": seed, "run": "r", "state": "finished"}
        | {"loss": 5 + np.log(rate / 0.013) ** 2 / 10 + 0.01 * seed + beta / 10}
        for rate, beta, seed in itertools.product(rates, betas, (0, 1))
    ]
    trials[-1] |= {"loss": None, "state": "diverged"}
    split = {"documents": 238, "bytes": 1_000_000, "tokens": 400_000, "bytes_per_token": 2.5, "shards": []}
    predicted = {"loss": 2.3456, "interval": [2.3, 2.4], "measured": 2.3789, "relative_error": 0.0142, "inside": True}
    cell = {
        "steps": 16,
        "repeats": 7,
        "prefill_tokens_per_second": 9000.0,
        "time_to_first_token_seconds": 0.01,
        "decode_tokens_per_second_aggregate": 43_217.0,
        "decode_tokens_per_second_slowest": 3000.0,
        "decode_tokens_per_second_fastest": 50_000.0,
        "decode_tokens_per_second_per_sequence": 4000.0,
        "seconds_per_step": 0.001,
        "kv_cache_bytes_filled": 4096,
    }
    return {
        "schema_version": 1,
        "settings": {"source": "sotu", "minutes": 8, "vocab_size": 512, "batch_size": 8, "seq_len": 128, "seed": 0},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "versions": {"python": "3.11", "jax": "0.10.2"},
        "transfer_rule": "learning rate = 0.01 · √(16 / d_model)",
        "totals": {"seconds": 474.0, "compiles": 9},
        "data": {
            "vocab_size": 512,
            "hash": "ab" * 32,
            "splits": {"train": split, "validation": split},
            "duplicates_dropped": 3,
            "empty_skipped": 0,
            "files_skipped": 0,
            "bytes_replaced": 7,
        },
        "design": Design(budgets=tuple(sorted({row["budget_flops"] for row in rows})), set={"beta2": 0.99}).to_dict(),
        "plan": {"proxy_d_model": 16, "sweep_steps": 100},
        "sweep": summarize({"learning_rate": rates, "beta2": betas}, trials).to_dict()
        | {"steps": 100, "config": presets.get("study-24").to_dict(), "base": {"schedule": "cosine"}},
        "ladder": rows,
        "fit": fitted(rows, folder),
        "prediction": {
            "size_from": "isoflop",
            "optimal_params": 1e5,
            "compute_over_largest_fitted": 3.0,
            "loss": 2.3456,
            "interval_95": [2.3, 2.4],
            "written_before_training": "2026-01-02T03:04:05Z",
            "runs": [{name: rows[-1][name] for name in ("name", "params", "tokens")} | predicted],
            "mean_relative_error": 0.0142,
            "inside": 1,
            "optimum": {"refused": "1 run is too few"},
        },
        "heldout": rows[-1]
        | {
            "loss": 2.3789,
            "run": "held_out/runs/d16-held",
            "seconds": 80.0,
            "error": 0.0333,
            "relative_error": 0.0142,
            "inside_interval": True,
            "tokens_per_second": 1e4,
            "flops_exact_per_second": 1e10,
        },
        "decode": [cell | {"batch": batch, "context": context} for batch in (1, 4) for context in (32, 96)],
        "samples": [{"prompt": "The people ", "text": "of the moon."}],
    }


@pytest.fixture
def document(tmp_path):
    return made(tmp_path)


def page(folder, document):
    study_page.write_study_page(folder, document)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_metrics):
    """The page of the whole document with real figures, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    document = made(folder)
    write_metrics(folder / "ladder" / document["ladder"][0]["run"], np.linspace(7, 3, 50))
    write_metrics(folder / "ladder" / document["heldout"]["run"], np.linspace(7, 2.4, 500))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(study_page, "fit_both", few_draws)
        return folder, page(folder, document)


def test_says_the_key_numbers(whole, document, words):
    folder, text = whole
    said = words(text)
    assert "predicted to be 2.346 nats per token (95 %: 2.300 … 2.400). It came out at 2.379" in said
    assert "1.4 % above the prediction, inside its interval" in said
    for part in (
        f"{document['fit']['isoflop']['a']:.2f}",
        f"{document['fit']['parametric']['b']:.2f}",
        "7.9 minutes",
        "43,217",
        "238",
        "2026-01-02 03:04:05 UTC",
        "1 of 16 runs diverged",
    ):
        assert part in said, part
    for part in ("sweep run study", "scaling run", "scaling fit", "scaling predict", "bench decode"):
        assert f"isoflop {part}" in said
    assert text.count("<figure") == 8
    assert len(text) < 3e6
    assert sorted(path.name for path in folder.iterdir()) == ["ladder", "report.html"]


def test_says_that_it_was_outside(tmp_path, document, words, undrawn):
    document["heldout"] |= {"loss": 2.5, "relative_error": 0.066, "error": 0.15, "inside_interval": False}
    said = words(page(tmp_path, document))
    assert "outside its interval" in said
    assert "The measured loss is outside the interval." in said


class References(html.parser.HTMLParser):
    """Everything that a browser would follow or run."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.tags, self.ids = [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                self.targets.append(value)
            if name == "id":
                self.ids.add(value)


def test_stands_alone(whole):
    _, text = whole
    found = References(text)
    assert not found.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert "@import" not in text
    targets = found.targets + re.findall(r"url\(([^)]*)\)", text)
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert {target[1:] for target in targets} <= found.ids, "what a figure refers to is there"


def test_trusts_no_text(tmp_path, document, undrawn):
    evil = "<script>alert('&')</script>"
    document["samples"] = [{"prompt": evil, "text": evil}]
    document["settings"]["source"] = evil
    document["sweep"]["warnings"] = [evil]
    document["transfer_rule"] = evil
    document["versions"]["jax"] = evil
    text = page(tmp_path, document)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6


def test_refused_fits(tmp_path, document, words):
    """Every reason stands in the page; the ladder's losses are still drawn."""
    document["ladder"] = document["ladder"][:4]
    document["ladder"][0] |= {"loss": None, "status": "diverged"}
    document["fit"] = fitted(document["ladder"], tmp_path)
    assert document["fit"]["parametric"] is None
    assert document["fit"]["isoflop"] is None
    document["prediction"] |= {"loss": None, "interval_95": None, "refused": document["fit"]["refused"]}
    for name in ("error", "relative_error", "inside_interval"):
        del document["heldout"][name]
    said = words(page(tmp_path, document))
    assert "3 usable runs" in said
    assert "1 of 4 budgets" not in said
    assert "No loss was predicted" in said
    assert "Neither estimator found a law" in said
    assert f"{document['ladder'][0]['name']}: loss is not finite" in said


def test_intervals_refused(tmp_path, document, words):
    document["fit"]["isoflop"] |= {"intervals": {}, "broken_draws": None}
    document["fit"]["refused"]["isoflop.intervals"] = "the noise is as large as the valleys are deep"
    said = words(page(tmp_path, document))
    assert "the noise is as large as the valleys are deep" in said
    assert "(no interval) by IsoFLOP valleys" in said


def test_held_out_run_diverged(tmp_path, document, words, write_metrics):
    write_metrics(tmp_path / "ladder" / document["heldout"]["run"], [7.0, 6.0, float("nan")])
    document["heldout"] |= {"loss": None, "status": "diverged"}
    for name in ("error", "relative_error", "inside_interval"):
        del document["heldout"][name]
    document |= {"decode": [], "samples": None}
    said = words(page(tmp_path, document))
    assert "but it diverged: the prediction is not tested" in said
    assert "Decoding was not measured, as the held-out run diverged." in said


@pytest.mark.parametrize("name", ["prediction", "heldout", "sweep", "decode", "samples", "fit"])
def test_a_missing_stage_is_said(tmp_path, document, name, words, undrawn):
    document[name] = None
    assert "Not shown." in words(page(tmp_path, document)) or name == "fit"


def test_one_seed_and_no_winner(tmp_path, document, words):
    sweep = document["sweep"]
    one = [trial for trial in sweep["trials"] if trial["seed"] == 0]
    document["sweep"] |= summarize(sweep["axes"], one).to_dict()
    assert "one seed per setting" in words(page(tmp_path, document))
    document["sweep"] |= summarize(
        sweep["axes"], [trial | {"loss": None, "state": "diverged"} for trial in one]
    ).to_dict()
    said = words(page(tmp_path, document))
    assert "every setting lost a run to divergence" in said
    assert "No trial has a loss." in said


def test_the_commands_of_the_ladder_are_a_study_that_can_be_read(document):
    text = "\n".join(command["text"] for command in commands(document))
    design = text.partition("cat > ladder.toml <<'END'\n")[2].partition("END\n")[0]
    assert Design.from_dict(tomllib.loads(design)).to_dict() == document["design"]
    assert "isoflop scaling run ladder.toml --data data --out ladder" in text

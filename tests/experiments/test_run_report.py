"""The page of runs: what they reached and where they differ, whole even of a run that was cut short."""

import json
from pathlib import Path

import pytest

from experiments.runs.report import write_run_page
from model.errors import InputError


def _run(folder: Path, losses: list[float], status: str = "finished", **hparams: float) -> Path:
    folder.mkdir()
    record = {
        "schema_version": 1, "status": status, "seconds": 2.0, "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "identity": {"config": {"d_model": 16}, "hparams": {"learning_rate": 0.01} | hparams, "data": "one"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    with (folder / "metrics.jsonl").open("w") as file:
        for i, loss in enumerate(losses, 1):
            line = {"step": i, "tokens": 64 * i, "epoch": 0.1, "flops_6nd": 1e6 * i, "loss": loss, "grad_norm": 1.0}
            line |= {"learning_rate": 0.01, "tokens_per_second": 100.0 * i, "skipped": 0}
            line |= {"validation_loss": loss + 1} if i == len(losses) and status == "finished" else {}
            file.write(json.dumps(line) + "\n")
    return folder


def test_a_page_says_what_runs_reached_and_where_they_differ(tmp_path):
    done = _run(tmp_path / "done", [3.0, 2.0, 1.5])
    cut = _run(tmp_path / "cut", [3.0, 2.5], status="running", learning_rate=0.02)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')  # as a kill leaves it
    rows = write_run_page(tmp_path / "page.html", [done, cut])
    assert [(row["steps"], row["loss"], row["validation_loss"]) for row in rows] == [(3, 1.5, 2.5), (2, 2.5, None)]
    assert [row["differing"] for row in rows] == [{"learning_rate": 0.01}, {"learning_rate": 0.02}]
    assert rows[0]["tokens_per_second"] == 250  # the median without the first step
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4
    assert "was interrupted or killed" in page
    assert "2.5000" in page


def _trained_by(run: Path, objective: dict, **metrics: float) -> Path:
    record = json.loads((run / "run.json").read_text())
    record["identity"]["objective"] = objective
    (run / "run.json").write_text(json.dumps(record))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | metrics)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_a_page_says_what_the_loss_of_an_objective_is(tmp_path):
    """One that is no likelihood of text has no bits per byte, and what it was trained with at a default counts too."""
    low = _trained_by(_run(tmp_path / "low", [3.0, 2.0]), {"name": "masked"})
    high = _trained_by(_run(tmp_path / "high", [3.0, 2.0], mask_rate=0.3), {"name": "masked", "evaluation_rate": 0.2})
    write_run_page(tmp_path / "page.html", [low])
    page = (tmp_path / "page.html").read_text()
    assert "nats per predicted token" in page
    assert "bits per byte" not in page
    rows = write_run_page(tmp_path / "page.html", [low, high])
    assert rows[0]["differing"] == {"mask_rate": 0.15, "objective.evaluation_rate": 0.15}
    plain = _run(tmp_path / "plain", [3.0, 2.0])
    rows = write_run_page(tmp_path / "page.html", [plain, low])
    assert [row["differing"] for row in rows] == [{"objective": "language-modeling"}, {"objective": "masked"}]
    labels = _trained_by(_run(tmp_path / "labels", [0.7, 0.6]), {"name": "classification"}, validation_accuracy=0.75)
    write_run_page(tmp_path / "page.html", [labels])
    page = (tmp_path / "page.html").read_text()
    assert "nats per document" in page
    assert "0.7500" in page


def test_what_is_no_run_or_has_no_step_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"not a run: it has no run\.json"):
        write_run_page(tmp_path / "page.html", [tmp_path])
    with pytest.raises(InputError, match="no step has been made yet"):
        write_run_page(tmp_path / "page.html", [_run(tmp_path / "empty", [])])
    with pytest.raises(InputError, match="at most 5"):
        write_run_page(tmp_path / "page.html", [tmp_path] * 6)


def test_a_phone_shows_every_panel_with_text_that_can_be_read(tmp_path, phone_figures):
    write_run_page(tmp_path / "page.html", [_run(tmp_path / "run", [3.0, 2.0, 1.5])])
    assert [figure.axes[0].get_ylabel() for figure in phone_figures] == [
        "loss (nats per token)",
        "learning rate",
        "norm of the gradient",
        "tokens per second",
    ]

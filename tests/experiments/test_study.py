"""The whole story in small: stopped in the middle, gone on with, and told once."""

import csv
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest

from experiments.bench.decode.grid import bench_decode
from experiments.scaling.study.design import Design
from experiments.scaling.study.run import read_study
from experiments.study import Settings, run_study
from experiments.study import run as study
from experiments.sweep.speed import Speed
from model import InputError

SETTINGS = Settings(vocab_size=320, batch_size=4, seq_len=32)


@pytest.fixture(scope="module")
def small(corpus: Path) -> Settings:
    return Settings(source=str(corpus), minutes=0.01, vocab_size=320, batch_size=8, seq_len=64, seed=3)


@pytest.fixture(scope="module")
def told(small: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Four sizes of three budgets, all small; Ctrl-C in the ladder, then the same call again."""
    folder = tmp_path_factory.mktemp("study") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LEARNING_RATES", (1e-2, 3e-2, 9e-2))
        patch.setattr(study, "BETA2", (0.95,))
        patch.setattr(study, "bench_decode", lambda *of, **_: bench_decode(*of, batches=(2,), contexts=(8,), steps=2))
        patch.setattr("experiments.scaling.study.cost.time_steps", lambda *_: Speed(1e-3, 1e10, 0.0))
        prepare = functools.partial(study.prepare_data, validation_fraction=0.2)  # of twelve documents
        patch.setattr(study, "prepare_data", prepare)
        design = study._design
        fewer = {"hours": 0.0, "budgets": (1e9, 2e9, 4e9), "sizes": 4, "evaluate_tokens": 512}
        patch.setattr(study, "_design", lambda settings: design(settings).replace(**fewer))

        def stop(*_, **__):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as interrupted:
            interrupted.setattr(study, "run_ladder", stop)
            with pytest.raises(KeyboardInterrupt):
                run_study(folder, small)
        assert sorted(path.stem for path in (folder / "stages").iterdir()) == ["data", "plan", "sweep"]

        with pytest.MonkeyPatch.context() as again:
            again.setattr(study, "run_sweep", stop)  # finished stages are not run again
            again.setattr(study, "prepare_data", stop)
            document = run_study(folder, small)
            assert run_study(folder, small) == document
    return folder, document


@pytest.mark.long
def test_document_has_every_part(told, small):
    folder, document = told
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(document))
    rows = document["ladder"]
    assert [sum(row["budget"] == budget for row in rows) for budget in range(3)] == [4, 4, 4]
    assert document["totals"]["compiles"] <= 1 + len({row["d_model"] for row in rows}) + 1
    assert all(row["status"] == "finished" and row["seed"] == small.seed for row in rows)
    assert len(document["decode"]) == 1
    assert len(document["samples"]) == 3


@pytest.mark.long
def test_the_ladder_is_a_study_with_the_sweeps_rate(told):
    folder, document = told
    design = read_study(folder / "ladder")
    assert design == Design.from_dict(document["design"])
    best = document["sweep"]["optimum"] or document["sweep"]["winner"]["setting"]
    for row in document["ladder"]:
        carried = best["learning_rate"] * document["plan"]["proxy_d_model"] / row["d_model"]
        assert row["learning_rate"] == pytest.approx(carried)
    assert len(list(csv.DictReader((folder / "ladder" / "runs.csv").open()))) == len(document["ladder"])


@pytest.mark.long
def test_prediction_was_written_before_the_run(told):
    folder, document = told
    heldout, prediction = document["heldout"], document["prediction"]
    assert prediction["compute_over_largest_fitted"] == pytest.approx(2, rel=0.1)
    record = json.loads((folder / "ladder" / heldout["run"] / "run.json").read_text())
    assert prediction["written_before_training"] <= record["created"].replace("+00:00", "Z")
    if prediction["loss"] is not None:
        assert heldout["error"] == pytest.approx(heldout["loss"] - prediction["loss"])
    assert f"{heldout['loss']:.3f}" in (folder / "report.html").read_text()


def test_folder_of_other_settings_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS.__dict__, "vocab_size": 99}))
    with pytest.raises(InputError, match="vocab_size=99 there, 320 here"):
        run_study(tmp_path, SETTINGS)


def test_a_corpus_is_known_by_what_it_holds(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "prepare_data", functools.partial(study.prepare_data, validation_fraction=0.2))
    settings = Settings(source=str(corpus), minutes=0.01, vocab_size=320, batch_size=8, seq_len=64)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "settings.json").write_text(json.dumps(settings.__dict__))
    study.prepare_data(corpus, tmp_path / "s" / "data", vocab_size=320)
    shutil.copytree(corpus, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    study._claim(tmp_path / "s", dataclasses.replace(settings, source="./moved"))
    (tmp_path / "moved" / "more.txt").write_text("one document more")
    with pytest.raises(InputError, match="was made from other documents"):
        study._claim(tmp_path / "s", dataclasses.replace(settings, source="moved"))
    with pytest.raises(InputError, match=r"source=.* there, stdlib here"):
        study._claim(tmp_path / "s", dataclasses.replace(settings, source="stdlib"))


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        run_study(tmp_path, SETTINGS)

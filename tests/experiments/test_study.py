"""The whole story in small: stopped in the middle, gone on with, and told once."""

import functools
import json
from pathlib import Path

import pytest

from experiments import study
from experiments.decode.bench import bench_decode
from experiments.scaling.probe import Probe
from experiments.study import Settings, run_study
from model import InputError

SETTINGS = Settings(vocab_size=320, batch_size=4, seq_len=32)


@pytest.fixture(scope="module")
def small(corpus: Path) -> Settings:
    return Settings(source=str(corpus), vocab_size=320, batch_size=8, seq_len=64)  # few steps for the tokens


@pytest.fixture(scope="module")
def told(small: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Budgets of a second each; Ctrl-C in the ladder, then the same call again."""
    folder = tmp_path_factory.mktemp("study") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LEARNING_RATES", (1e-2, 3e-2, 9e-2))
        patch.setattr(study, "BETA2", (0.95,))
        patch.setattr(study, "BUDGETS", 2)
        patch.setattr(study, "bench_decode", lambda *of, **_: bench_decode(*of, batches=(2,), contexts=(8,), steps=2))
        patch.setattr(study, "probe", lambda *_, **__: Probe(1e-3, 1e10, 1.0, []))
        prepare = functools.partial(study.prepare_data, validation_fraction=0.2)  # of twelve documents
        patch.setattr(study, "prepare_data", prepare)
        patch.setattr(study, "largest_smallest_budget", lambda *_: 3e9)

        def stop(*_, **__):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as interrupted:
            interrupted.setattr(study, "train_rungs", stop)
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
def test_document_has_every_part(told):
    folder, document = told
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(document))
    assert document["sweep"]["compiles"] == 1
    budgets = {row["budget"] for row in document["ladder"]}
    assert len(budgets) == 2
    assert all(sum(row["budget"] == budget for row in document["ladder"]) >= 4 for budget in budgets)
    assert document["totals"]["compiles"] <= 1 + len({row["d_model"] for row in document["ladder"]}) + 1
    assert all(row["status"] == "finished" for row in document["ladder"])
    assert len(document["decode"]) == 1
    assert len(document["samples"]) == 3


@pytest.mark.long
def test_prediction_was_written_before_the_run(told):
    folder, document = told
    heldout, prediction = document["heldout"], document["prediction"]
    assert prediction["compute_over_largest_fitted"] >= 3
    record = json.loads((folder / "heldout" / heldout["run"] / "run.json").read_text())
    assert prediction["written_before_training"] <= record["created"].replace("+00:00", "Z")
    assert heldout["params"] == prediction["rung"]["params"]
    if prediction["loss"] is not None:
        assert heldout["error"] == pytest.approx(heldout["loss"] - prediction["loss"])


@pytest.mark.long
def test_page_and_table(told):
    folder, document = told
    page = (folder / "report.html").read_text()
    assert f"{document['heldout']['loss']:.3f}" in page
    lines = (folder / "ladder" / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + len(document["ladder"])
    assert lines[0].startswith("params,tokens,loss")


def test_folder_of_other_settings_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS.__dict__, "vocab_size": 99}))
    with pytest.raises(InputError, match="vocab_size=99 there, 320 here"):
        run_study(tmp_path, SETTINGS)


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        run_study(tmp_path, SETTINGS)

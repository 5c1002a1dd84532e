"""Commands that read leave every file as it was, and make none but those that were asked for."""

import json
import shutil

import pytest

from experiments.scaling.rows.tables import write_csv
from experiments.scaling.study.design import Design
from experiments.sweep.definition import define
from experiments.sweep.run import begin
from model import presets
from model.errors import InputError
from model.store import open_model
from train import HParams, Shell, TrainConfig, train
from train.branch import cooldown
from train.data import prepare
from train.data.folders import data_of
from train.run import read_record

TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32, rope_base=9_200.0)


def files(folder):
    """Every file and folder below, by name, time and content."""
    paths = sorted(folder.rglob("*"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Data, a run, two sweeps with a finished trial each, a study's runs of a known law, a benchmark."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(data, folder / "data")
    config = TINY.replace(vocab_size=320)
    hparams, shell = HParams(learning_rate=0.01), Shell(evaluate_tokens=64)
    train(
        config, TrainConfig(batch_size=2, seq_len=32, schedule="constant"), hparams,
        data=folder / "data", run=folder / "run", steps=2, shell=shell,
    )  # fmt: skip
    for name, storage in (("own", None), ("shared", f"journal:{folder}/log"), ("file", f"sqlite:///{folder}/all.db")):
        sweep = define(
            TINY, data=folder / "data", folder=folder / name, steps=2, batch_size=2, seq_len=32,
            axes=("learning_rate=1e-3,1e-2",), storage=storage,
        )  # fmt: skip
        ledger = begin(sweep)
        for claim in ledger.claim({row.trial.id: 2 for row in ledger.rows()}, 2):
            loss = 3 + float(claim.trial.recipe.hparams.learning_rate)
            shutil.copytree(folder / "run", sweep.run_folder(claim.trial))
            ledger.finish(claim, [loss], {"run": f"runs/{claim.trial.id}", "steps": 2, "loss": loss})
        ledger.storage.forget_session()
    rows = [
        {"name": f"{n:g}-{c:g}", "params": n, "tokens": c / 6 / n, "flops_6nd": c, "held_out": False}
        | {"loss": 1.7 + 400 * n**-0.34 + 410 * (c / 6 / n) ** -0.28}
        for c in (1e18, 1e19, 1e20)
        for n in (c**0.5 / 40 * factor for factor in (0.25, 0.5, 1, 2, 4))
    ]
    (folder / "study").mkdir()
    write_csv(folder / "study" / "runs.csv", rows)
    (folder / "study" / "design.json").write_text(
        json.dumps({"schema_version": 1, "design": Design(budgets=(1e18, 1e19)).to_dict()})
    )
    (folder / "design.toml").write_text(
        'base = "tiny"\nbudgets = [1.5e8, 3e8, 6e8]\nsizes = 4\nseq_len = 32\ntokens_per_parameter = 0.05\n'
    )
    return folder


READING = {
    "sweep status": ("sweep", "status", "{0}/own"),
    "sweep status of a journal": ("sweep", "status", "{0}/shared"),
    "sweep status of a database": ("sweep", "status", "{0}/file"),
    "sweep report": ("sweep", "report", "{0}/own", "--out", "{1}/page.html", "--json", "{1}/page.json"),
    "sweep report of a journal": ("sweep", "report", "{0}/shared", "--out", "{1}/page.html"),
    "sweep plan": (
        *("sweep", "plan", "tiny", "--data", "{0}/data", "--out", "{0}/new", "--steps", "2", "--seq-len", "32"),
        *("--set", "learning_rate=1e-3,1e-2", "--no-probe"),
    ),
    "sweep replay": ("sweep", "replay", "{0}/own", "--samplers", "random", "--replays", "1"),
    "scaling report": ("scaling", "report", "{0}/study", "--out", "{1}/page.html", "--bootstraps", "20"),
    "scaling fit": ("scaling", "fit", "{0}/study", "--bootstraps", "20", "--json", "{1}/fit.json"),
    "scaling predict": ("scaling", "predict", "{0}/study", "--flops", "1e21", "--bootstraps", "20"),
    "scaling plan": ("scaling", "plan", "{0}/design.toml", "--data", "{0}/data", "--no-probe"),
    "data inspect": ("data", "inspect", "{0}/data"),
    "eval": ("eval", "{0}/run", "--data", "{0}/data", "--max-tokens", "64"),
    "generate": ("generate", "{0}/run", "--prompt", "the", "--max-new-tokens", "2"),
    "report": ("report", "{0}/run", "--out", "{1}/page.html"),
    "model show": ("model", "show", "tiny", "--json", "{1}/show.json"),
    "train --help": ("train", "--help"),
}


@pytest.mark.parametrize("name", READING)
def test_reading_changes_nothing_and_makes_what_was_asked_for(name, made, tmp_path, isoflop, no_svg):
    before = files(made)
    call = [word.format(made, tmp_path) for word in READING[name]]
    code, _, error = isoflop(*call)
    assert code == 0, error
    assert files(made) == before
    asked = {word.rpartition("/")[2] for word in call if str(tmp_path) in word}
    assert {path.name for path in tmp_path.iterdir()} == asked


def test_a_run_finds_the_data_that_were_moved_with_it(made, data, tmp_path, isoflop):
    """Apart from them a person says where they are; what lies there is compared with what the run was trained on."""
    for name in ("data", "run"):
        shutil.copytree(made / name, tmp_path / "there" / name)
    record = read_record(made / "run")
    (tmp_path / "there" / "run" / "run.json").write_text(json.dumps(record | {"data": "/gone/data"}))
    run = tmp_path / "there" / "run"
    assert data_of(run, read_record(run)) == str(tmp_path / "there" / "data")
    plan = cooldown(run, 2, 1)
    assert (plan.folders, plan.start.folder) == (str(tmp_path / "there" / "data"), run)
    assert open_model(run).tokenizer.vocab_size == 320

    (tmp_path / "there" / "data").rename(tmp_path / "elsewhere")
    code, _, error = isoflop("cool", run, "--at", 2, "--out", tmp_path / "cooled")
    assert (code, "no data folder at /gone/data" in error) == (2, True), error
    assert cooldown(run, 2, 1, data=tmp_path / "elsewhere").folders == str(tmp_path / "elsewhere")
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"other words, number {number}, of another corpus. " * 20)
    prepare(tmp_path / "texts", tmp_path / "other", vocab_size=300, validation_fraction=0.3)
    with pytest.raises(InputError, match=r"holds other data than .* was trained on; give those with --data"):
        cooldown(run, 2, 1, data=tmp_path / "other")

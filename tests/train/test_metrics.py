"""What a run records: strict JSON, books that add up, and the same numbers wherever they go."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from model import ModelConfig, accounting
from model.errors import InputError
from train import HParams, Shell, TrainConfig, train
from train.data import load_manifest
from train.norms import groups_of
from train.objectives import LanguageModeling
from train.run.metrics import TIMING_FIELDS, read_metrics
from train.trace import Trace

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_006.0)
TRAIN = TrainConfig(batch_size=4, seq_len=16)
STEPS = 12


class WandB:
    """A stand-in: notes what it is told."""

    def __init__(self):
        self.opened, self.logged, self.finished = [], {}, 0

    def init(self, **options):
        self.opened.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, numbers, step):
        self.logged[step] = dict(numbers)

    def finish(self):
        self.finished += 1


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(folder, result, what Weights & Biases was told)"""
    folder, wandb = tmp_path_factory.mktemp("metrics") / "run", WandB()
    shell = Shell(evaluate_every=4, evaluate_tokens=128, wandb="a project", profile=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        result = train(CONFIG, TRAIN, HParams(), data=data, run=folder, steps=STEPS, shell=shell)
    return folder, result, wandb


@pytest.fixture(scope="module")
def lines(run):
    return read_metrics(run[0])


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_every_line_is_strict_json(run, lines):
    text = (run[0] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in text] == lines
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_what_is_not_finite_is_null(data, tmp_path):
    shell = Shell(evaluate_every=1, evaluate_tokens=128)
    hparams = HParams(learning_rate=1e38, clip_norm=0, total_steps=STEPS)
    result = train(CONFIG, TRAIN, hparams, data=data, run=tmp_path, steps=STEPS, shell=shell)
    assert result.status == "diverged"
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in text]
    assert any(lines[-1][name] is None for name in ("loss", "grad_norm", "update_norm"))
    assert lines[-1]["param_norm"] is not None  # of the parameters that the state still holds
    json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)


def test_losses_in_other_units(data, lines):
    splits = load_manifest(data).splits
    for line in lines:
        for prefix, split in (("", "train"), ("validation_", "validation")):
            assert (f"{prefix}loss" in line) == (prefix == "" or line["step"] % 4 == 0)
            if f"{prefix}loss" in line:
                nats = line[f"{prefix}loss"]
                assert line[f"{prefix}perplexity"] == pytest.approx(math.exp(nats))
                bits = nats / math.log(2) / splits[split].bytes_per_token
                assert line[f"{prefix}bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize("name", ["grad_norm", "param_norm", "update_norm"])
def test_norms_of_the_groups_make_the_norm(lines, name):
    for line in lines:
        groups = {key for key in line if key.startswith(f"{name}/")}
        assert groups == {f"{name}/{group}" for group in groups_of(CONFIG, LanguageModeling())}
        assert math.sqrt(sum(line[group] ** 2 for group in groups)) == pytest.approx(line[name], rel=1e-5)
        assert line[name] > 0


def test_without_groups_the_norms_stay(data, tmp_path, lines):
    result = train(CONFIG, TRAIN.replace(norms=False), HParams(), data=data, run=tmp_path, steps=STEPS)
    alone = read_metrics(tmp_path)
    assert not [name for name in alone[-1] if "/" in name]
    for name in ("loss", "grad_norm", "param_norm", "update_norm"):
        np.testing.assert_allclose([line[name] for line in alone], [line[name] for line in lines], rtol=1e-5)
    assert result.status == "finished"


def test_books(data, run, lines):
    for line in lines:
        assert line["tokens"] == 64 * line["step"]
        for name, convention in (("flops_6nd", "6N"), ("flops_exact", "exact")):
            per_token = accounting.flops_per_token(CONFIG, 16, convention)
            assert line[name] == pytest.approx(line["tokens"] * per_token)
        assert line["skipped"] == 0
    assert (run[1].tokens, run[1].flops_exact) == (lines[-1]["tokens"], lines[-1]["flops_exact"])


def test_seconds_add_up(run, lines):
    for line in lines:
        parts = [line[f"{part}_seconds"] for part in ("data", "dispatch", "device")]
        assert min(parts) >= 0
        assert sum(parts) <= 1.05 * line["step_seconds"]
        assert line["tokens_per_second"] == pytest.approx(64 / line["step_seconds"])
        assert 0 < line["mfu"] < 1
    assert lines[-1]["seconds"] == pytest.approx(sum(line["step_seconds"] for line in lines))
    assert run[1].seconds == lines[-1]["seconds"]


def test_only_times_differ_between_equal_runs(data, tmp_path, lines):
    shell = Shell(evaluate_every=4, evaluate_tokens=128)
    train(CONFIG, TRAIN, HParams(), data=data, run=tmp_path, steps=STEPS, shell=shell)
    different = set()
    for line, again in zip(lines, read_metrics(tmp_path), strict=True):
        assert line.keys() == again.keys()
        different |= {name for name in line if line[name] != again[name]}
    assert different == set(TIMING_FIELDS)


def test_weights_and_biases_gets_the_same_numbers(run, lines):
    folder, _, wandb = run
    (options,) = wandb.opened
    record = json.loads((folder / "run.json").read_text())
    assert (options["project"], options["name"], options["id"]) == ("a project", "run", record["wandb_id"])
    assert options["config"] == record["identity"]
    assert wandb.finished == 1
    numbers = {line["step"]: {name: value for name, value in line.items() if name != "step"} for line in lines}
    assert wandb.logged == numbers


def test_without_weights_and_biases_it_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'isoflop\[wandb\]'"):
        train(CONFIG, TRAIN, HParams(), data=data, run=tmp_path, steps=STEPS, shell=Shell(wandb="a project"))


def test_a_trace_is_written(run):
    assert list((run[0] / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(("steps", "wanted"), [(12, ["begun", "ended"]), (7, ["begun", "ended"]), (4, [])])
def test_a_trace_that_is_begun_is_ended_once(monkeypatch, tmp_path, steps, wanted):
    """Also where the run ends within it."""
    happened = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: happened.append("begun"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: happened.append("ended"))
    trace = Trace(tmp_path)
    for _ in range(steps):
        trace.step(None)
    trace.close(None)
    assert happened == wanted

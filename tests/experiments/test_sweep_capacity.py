"""The objective capacity: what a service level is, what it refuses, and a sweep that has it beside the loss."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from experiments.commands.sweep.options import SweepOptions
from experiments.commands.sweep.run import show
from experiments.sweep.analysis.pareto import pareto
from experiments.sweep.capacity import CAPACITY, ServiceLevel
from experiments.sweep.record import Sweep
from model.errors import InputError

AXES = ("num_kv_heads=1,2", "decode.weights=float32,int8")


@pytest.fixture
def define(data, tmp_path):
    """A sweep over GQA ratio and weights as `isoflop sweep run` defines it; nothing is written."""

    def define(**changes):
        given = {"preset": "tiny", "set": AXES, "steps": 2, "evaluate_tokens": 128, "base": ("decode.context=16",)}
        given |= {"data": data, "out": tmp_path / "sweep", "batch_size": 4, "seq_len": 32}
        given |= {"objective": ("loss", CAPACITY), "service_level": ("ttft:150", "tpot:100")}
        return SweepOptions(**given | changes).define()

    return define


def test_a_service_level_is_part_of_the_sweep(define):
    sweep = define(service_share=0.9)
    assert sweep.service == ServiceLevel(("ttft:150", "tpot:100"), 0.9)
    sweep.folder.mkdir()
    sweep.write()
    assert Sweep.read(sweep.folder).service == sweep.service
    with pytest.raises(InputError, match="another sweep: service"):
        define(service_share=0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"service_level": ()}, "go together"),
        ({"objective": ("loss",)}, "go together"),
        ({"service_level": ("ttft",)}, "of the form"),
        ({"service_share": 1.0}, "share of good requests"),
        ({"base": ("decode.context=64",)}, "do not fit max_seq_len=64"),
        ({"set": ("decode.weights=int9",)}, "weight type"),
        ({"set": ("decode.cache=int9",)}, "cache"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(define, changes, message):
    with pytest.raises(InputError, match=message):
        define(**changes)


def test_a_measurement_is_kept_and_read_again(tmp_path, monkeypatch):
    level, file = ServiceLevel(("ttft:5",)), tmp_path / "capacity" / "trial.json"
    found = {"capacity": {"capacity_requests_per_second": 4.0, "standard_error": 0.5}}
    calls = []
    monkeypatch.setattr(ServiceLevel, "_measured", lambda self, trial, run: calls.append(run) or found)
    for _ in range(2):
        measured = level.measure(SimpleNamespace(), tmp_path / "run", file)
        assert measured == {"capacity": 4.0, "capacity_standard_error": 0.5}
    assert len(calls) == 1


def test_errors_of_measurements_decide_what_is_near_the_front():
    """One seed each: the middle setting is worse in both, by less than the noise of the capacities or by more."""
    for error, place in ((1.0, "near"), (0.01, "behind")):
        rows = [
            {"kv": kv, "state": "finished", "loss": loss, CAPACITY: rate, "capacity_standard_error": error}
            | {"id": str(kv), "seed": 0, "member": None, "rungs": {}, "last_loss": loss, "planned_tokens": 1}
            for kv, loss, rate in ((1, 2.0, 10.0), (2, 2.0, 9.0), (4, 1.9, 5.0))
        ]
        found = pareto(["kv"], rows, ["loss", CAPACITY])
        assert [row.place for row in found.settings] == ["front", place, "front"]
        assert found.settings[0].errors == [0.0, error]


@pytest.mark.long
def test_a_sweep_over_gqa_and_weights_gives_every_capacity_with_its_error(define, capsys):
    from experiments.commands.sweep.run import _outcome
    from experiments.sweep.ledger import Ledger
    from experiments.sweep.run import run_sweep

    sweep = define(service_share=0.8)
    sweep = dataclasses.replace(sweep, service=dataclasses.replace(sweep.service, requests=20))
    run_sweep(sweep)
    outcome = _outcome(sweep, Ledger(sweep, read_only=True))
    assert len(outcome.front.settings) == 4
    for row in outcome.front.settings:
        assert row.values[1] > 0
        assert row.errors[1] > 0
    show(outcome)
    assert "Pareto front" in capsys.readouterr().out
    kept = [json.loads(file.read_text()) for file in (sweep.folder / "capacity").glob("*.json")]
    assert {one["decode"]["weights"] for one in kept} == {"float32", "int8"}

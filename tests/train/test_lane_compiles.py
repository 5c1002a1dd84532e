"""A sweep over what is traced compiles one program, and traces the step once."""

import itertools
import math

import jax
import numpy as np
import pytest

from model import presets
from train import HParams, Shell, TrainConfig, population, train_step
from train.lanes import vmapped
from train.lanes.build import compiled_programs
from train.lanes.slots import Slots

TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=32)
QUIET = Shell(evaluate_tokens=128)


def test_learning_rates_trace_the_step_once(data, tmp_path, monkeypatch):
    traces = []

    def counted(*arguments, **keywords):
        traces.append(1)
        return train_step(*arguments, **keywords)

    monkeypatch.setattr(vmapped, "train_step", counted)
    # A static shape that no other test has compiled.
    config = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, num_layers=1, rope_base=9_999.0)
    train_config = TRAIN_CONFIG.replace(norms=False)
    before = compiled_programs()
    lanes = [HParams(learning_rate=1e-4 * 1.4**i) for i in range(4)]
    runs = [tmp_path / str(i) for i in range(4)]
    population(config, train_config, lanes, data=data, runs=runs, steps=3, shell=QUIET)
    more = [tmp_path / f"more-{i}" for i in range(2)]
    lanes = [lane.replace(weight_decay=0.3) for lane in lanes[:2]]
    population(config, train_config, lanes, lanes=4, data=data, runs=more, steps=4, shell=QUIET)
    assert compiled_programs() - before == 1
    assert sum(traces) == 1


def test_whatever_the_order_of_ends_lanes_shrink_at_most_log2_times():
    random = np.random.default_rng(0)
    for lanes, multiple in itertools.product((1, 2, 5, 8, 24, 40, 64), (1, 2, 8)):
        lanes = -(-lanes // multiple) * multiple
        for trials in {1, lanes // 2 + 1, lanes}:
            slots, going_on, counts = Slots(lanes, tuple(range(trials))), set(range(trials)), set()
            while going_on:
                before, slots = slots, slots.compacted(going_on, multiple)
                counts.add(slots.lanes)
                assert going_on <= set(slots.members)
                assert len(slots.members) <= slots.lanes < 2 * len(going_on) + multiple
                assert not slots.lanes % multiple
                held = [before.members[source] for source in slots.sources(before)]
                assert held[: len(slots.members)] == list(slots.members)
                going_on -= set(random.permutation(list(going_on))[: random.integers(1, 5)].tolist())
            assert len(counts - {lanes}) <= math.ceil(math.log2(lanes))


@pytest.mark.long
@pytest.mark.parametrize(("backend", "programs"), [("gpu", (1, 2)), ("cpu", (1, 0))])  # 8 lanes, then 4 and 2
def test_lanes_that_have_ended_are_compacted_away(data, tmp_path, monkeypatch, backend, programs):
    """What accelerators do; on a CPU a lane that has ended costs nothing, and each is the program of one."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, rope_base=9_990.0 + sum(programs))
    horizons = [2, 8, 2, 4, 2, 8, 4, 2]
    lanes = [HParams(learning_rate=1e-3 * (i + 1), seed=i, total_steps=steps) for i, steps in enumerate(horizons)]
    ends = []
    for compact, expected in zip((False, True), programs, strict=True):
        before = compiled_programs()
        runs = [tmp_path / f"{compact}-{i}" for i in range(8)]
        shell = Shell(evaluate_tokens=128, compact=compact)
        ends.append(population(config, TRAIN_CONFIG, lanes, data=data, runs=runs, shell=shell))
        assert compiled_programs() - before == expected
    for whole, compacted in zip(*ends, strict=True):
        assert whole.steps == compacted.steps
        assert compacted.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)

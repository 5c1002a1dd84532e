"""Tasks during training: packed choices are scored as alone, and a run records them whatever happens to it."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from infer import score
from model import Experts, InputError, ModelConfig
from model.errors import UnknownNameError
from train import HParams, RunOptions, TrainConfig, load_run, population, train
from train.clusters import cluster_ids, standard_error
from train.config import stack_hparams
from train.lanes.build import compiled_scorers
from train.lanes.vmapped import score_lane
from train.run.checkpoint import Checkpoints
from train.run.metrics import read_metrics
from train.state import TrainState
from train.step import score_step
from train.task_sets import (
    ERROR,
    EncodedQuestion,
    TaskResult,
    TaskSet,
    answers_path,
    higher_is_better,
    pack,
)

CONFIG = ModelConfig(
    vocab_size=320,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_ff=32,
    max_seq_len=48,
    position="learned",
    sliding_window=4,
    layer_pattern=("local", "global"),
    eos_token_ids=(2,),
)
TRAIN = TrainConfig(batch_size=4, seq_len=16, norms=False)
METRICS = ("acc", "acc_norm", "bits_per_byte")


def question(random, number, choices=3, longest=12):
    """Ids at random; an empty context now and then."""
    draw = lambda least, most: tuple(random.integers(3, 320, random.integers(least, most + 1)).tolist())
    context = () if number % 5 == 0 else draw(1, longest // 2)
    pairs = tuple((context, draw(1, longest // 2)) for _ in range(choices))
    lengths = tuple(3 * len(continuation) for _, continuation in pairs)
    return EncodedQuestion(f"q{number}", pairs, (number % choices,), lengths, lengths, f"c{number % 4}")


def task_set(name="one", count=20, **options):
    random = np.random.default_rng(count)
    return TaskSet(name, tuple(question(random, number, **options) for number in range(count)))


TASKS = (task_set(), task_set("two", 7, choices=2))
OPTIONS = RunOptions(
    evaluate_every=2, evaluate_tokens=128, tasks=TASKS, keep_best="one/bits_per_byte", checkpoint_every=3
)


def alone(config, params, tasks=TASKS):
    """The log-probability of every choice as `infer.score` gives it."""
    pairs = [pair for task in tasks for question in task.questions for pair in question.pairs]
    return score(config, params, pairs).logprobs


@functools.cache
def scorer(config):
    return jax.jit(functools.partial(score_step, config))


def packed(config, params, tasks=TASKS, batch_size=4, seq_len=16):
    rows = pack(tasks, config, batch_size, seq_len)
    nats = [np.asarray(scorer(config)(params, batch)) for batch in rows.batches]
    return np.concatenate([result.log_probs for result in rows.results(nats)])


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG.replace(position="alibi", num_layers=1, experts=Experts(count=4, top_k=2, d_ff=12)),
    ],
    ids=["learned-window", "alibi-experts"],
)
def test_packed_choices_are_scored_as_alone(config, random_params):
    params = random_params(config)
    expected = alone(config, params)
    np.testing.assert_allclose(packed(config, params), expected, rtol=1e-5)
    if config.experts is None:  # other neighbours, other padding
        np.testing.assert_allclose(packed(config, params, batch_size=3, seq_len=48), expected, rtol=1e-5)


def test_rows_hold_every_choice_once():
    rows = pack(TASKS, CONFIG, 4, 16)
    requests = np.concatenate(rows.requests).ravel()
    choices = [pair for task in TASKS for question in task.questions for pair in question.pairs]
    assert np.bincount(requests[requests >= 0]).tolist() == [len(continuation) for _, continuation in choices]
    whole = {name: np.concatenate([batch[name] for batch in rows.batches]) for name in rows.batches[0]}
    for number, (context, continuation) in enumerate(choices):
        assert tuple(whole["targets"].ravel()[requests == number]) == continuation
        row, places = np.nonzero(requests.reshape(whole["scored"].shape) == number)
        scored = whole["scored"][row, places]
        read = [*(context or (2,)), *continuation][:-1]
        here = slice(scored[-1] + 1 - len(read), scored[-1] + 1)
        assert whole["tokens"][row[0], here].tolist() == read
        assert whole["positions"][row[0], here].tolist() == list(range(len(read)))
        assert scored.tolist() == list(range(here.stop - len(continuation), here.stop))
    np.testing.assert_array_equal(whole["loss_mask"].ravel() > 0, requests >= 0)
    full = whole["segment_ids"] > 0
    assert full[: -rows.batches[0]["tokens"].shape[0]].mean() > 0.9
    assert rows.row[0] == 16
    assert rows.shortened == 0
    assert pack((), CONFIG, 4, 16).batches == []


def test_long_contexts_lengthen_the_rows_then_lose_their_beginning(caplog):
    def of(length):
        pairs = ((tuple(range(3, 3 + length)), (7, 8)), ((5,), (9,)))
        return TaskSet("long", (EncodedQuestion("q", pairs, (0,), (2, 1), (2, 1)),))

    assert pack([of(20)], CONFIG, 4, 16).row[0] == 32
    rows = pack([of(60)], CONFIG, 4, 16)
    assert (rows.row[0], rows.shortened) == (48, 1)
    assert "1 of 2 choices of the tasks lose tokens at the beginning" in caplog.text
    row = np.concatenate([batch["tokens"] for batch in rows.batches])[0]
    assert row.tolist() == [*range(3 + 60 - 47, 3 + 60), 7]
    with pytest.raises(InputError, match="does not fit into rows of 16"):
        pack([of(1), task_set("wide", 1, longest=80)], CONFIG.replace(max_seq_len=16), 4, 16)


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        (TASKS, {"eos_token_ids": ()}, "no eos_token_ids to stand for it"),
        (TASKS, {"vocab_size": 100}, "outside the model's vocab_size=100"),
        ((TASKS[0], TASKS[0]), {}, "name one twice"),
        ((TaskSet("none", ()),), {}, "the task none has no questions"),
        (TASKS, {"head": "scalar"}, "cannot score the choices of a task"),
    ],
)
def test_what_cannot_be_scored_is_refused(tasks, changes, message):
    with pytest.raises(InputError, match=message):
        pack(tasks, CONFIG.replace(**changes), 4, 16)


def test_metrics_are_those_of_the_choices():
    pairs = (((), (5,)), ((), (6, 7)))
    questions = [EncodedQuestion(f"q{i}", pairs, (gold,), (4, 8), (4, 8)) for i, gold in enumerate((0, 1))]
    result = TaskResult(TaskSet("t", tuple(questions)), np.array([-2.0, -3.0, -2.0, -3.0]))
    assert result.by_question["acc"].tolist() == [1, 0]
    assert result.by_question["acc_norm"].tolist() == [0, 1]  # −0.5 and −0.375 per character
    bits = np.array([2 / 4, 3 / 8]) / math.log(2)
    np.testing.assert_allclose(result.by_question["bits_per_byte"], bits)
    assert result.metrics["t/bits_per_byte"] == pytest.approx(bits.mean())
    assert result.metrics[f"t/acc{ERROR}"] == pytest.approx(0.5)
    broken = TaskResult(result.task_set, np.array([-2.0, -math.inf, -2.0, -3.0]))
    assert all(math.isnan(value) for value in broken.metrics.values())
    single = TaskSet("one", (EncodedQuestion("q", ((pairs[0]),), (0,), (4,), (4,)),))
    assert single.metrics == ("one/bits_per_byte",), "with one choice, every answer would be correct"
    assert TaskResult(single, np.array([-2.0])).by_question["bits_per_byte"].tolist() == [2 / 4 / math.log(2)]
    assert [higher_is_better(f"t/{metric}") for metric in METRICS] == [True, True, False]
    with pytest.raises(UnknownNameError, match="unknown metric of a task 'accuracy'"):
        higher_is_better("t/accuracy")


def test_the_standard_error_covers_clusters():
    """For independent questions it is the plain one; for clusters, that of repeated draws of clusters."""
    random = np.random.default_rng(0)
    values = random.normal(size=50)
    for each in (None, np.arange(50)):
        assert standard_error(values, each) == pytest.approx((values.std(ddof=1) / 50**0.5, 49.0))
    for alone in (standard_error(values[:1]), standard_error(values, np.zeros(50, int))):
        assert math.isnan(alone[0])
        assert alone[1] == 0
    clusters = np.repeat(np.arange(20), 10)
    draws = random.normal(size=(2000, 20)).repeat(10, axis=1) + random.normal(size=(2000, 200))
    errors = np.array([standard_error(values, clusters)[0] for values in draws])
    assert np.sqrt((errors**2).mean()) == pytest.approx(draws.mean(axis=1).std(), rel=0.05)
    assert cluster_ids(["x", "", "x"]).tolist() == [1, 0, 1]
    assert cluster_ids(["x", "x"]) is None


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two lanes, uninterrupted, and how many programs that score were compiled."""
    folder, before = tmp_path_factory.mktemp("whole"), compiled_scorers()
    runs = [folder / str(seed) for seed in (0, 1)]
    population(CONFIG, TRAIN, lanes(), data=data, runs=runs, steps=6, shell=OPTIONS)
    return runs, before


def lanes():
    return [HParams(learning_rate=rate, seed=seed) for seed, rate in enumerate((1e-2, 3e-2))]


def test_a_run_records_its_tasks_with_each_validation(whole, record):
    runs, _ = whole
    lines = read_metrics(runs[0])
    names = {f"{task.name}/{metric}{suffix}" for task in TASKS for metric in METRICS for suffix in ("", ERROR)}
    for line in lines:
        assert (names <= line.keys()) == ("validation_loss" in line) == (line["step"] % 2 == 0)
    config, params = load_run(runs[0])
    expected, first = alone(config, params), 0
    for task in TASKS:
        kept = json.loads(answers_path(runs[0], task.name).read_text())
        assert kept["step"] == 6
        assert kept["ids"] == [question.id for question in task.questions]
        log_probs = expected[first : first + task.choices]
        np.testing.assert_allclose(kept["log_probs"], log_probs, rtol=1e-5)
        for name, value in TaskResult(task, log_probs).metrics.items():
            assert lines[-1][name] == pytest.approx(value, rel=1e-5)
        assert np.mean(kept["metrics"]["bits_per_byte"]) == pytest.approx(lines[-1][f"{task.name}/bits_per_byte"])
        first += task.choices
    validated = [line for line in lines if "one/bits_per_byte" in line]
    best = min(validated, key=lambda line: line["one/bits_per_byte"])["step"]
    assert best in Checkpoints(runs[0], read_only=True).steps()


def test_lane_equals_solo_and_resumed_equals_uninterrupted_in_one_program(whole, data, record, crash, tmp_path):
    runs, before = whole
    go = functools.partial(train, CONFIG, TRAIN, lanes()[1], data=data, run=tmp_path / "run", steps=6, shell=OPTIONS)
    with crash(5):
        go()
    go()
    assert record(tmp_path / "run") == record(runs[1])
    assert answers_path(tmp_path / "run", "one").read_bytes() == answers_path(runs[1], "one").read_bytes()
    assert compiled_scorers() == before + 1
    without = RunOptions(evaluate_every=2, evaluate_tokens=128)
    train(CONFIG, TRAIN, lanes()[1], data=data, run=tmp_path / "without", steps=6, shell=without)
    assert compiled_scorers() == before + 1
    plain = [{name: value for name, value in line.items() if "/" not in name} for line in record(runs[1])]
    assert plain == record(tmp_path / "without")  # no task changes a number of training
    ids = [json.loads((run / "run.json").read_text())["run_id"] for run in (runs[1], tmp_path / "without")]
    assert ids[0] == ids[1]


def test_a_vmapped_lane_is_scored_as_its_own_state(random_params):
    both, batch = [random_params(CONFIG, seed) for seed in (0, 1)], pack(TASKS, CONFIG, 4, 16).batches[0]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *both)
    hparams = stack_hparams(lanes())

    @jax.jit
    def score_of(params, hparams, lane, batch, before):
        state = TrainState(params=params, optimizer=(), step=None, rng=None, skipped=None, skipped_in_a_row=None)
        return score_lane(CONFIG, state, lane, batch, before, None, hparams)

    found, before = score_of(stacked, hparams, np.int32(1), batch, np.zeros(2, np.float32))
    np.testing.assert_allclose(found, scorer(CONFIG)(both[1], batch), rtol=1e-5, atol=1e-6)
    assert before.shape == (2,)


def test_a_metric_that_is_not_measured_is_refused(data, tmp_path):
    options = RunOptions(evaluate_tokens=128, tasks=TASKS, keep_best="three/acc")
    with pytest.raises(InputError, match=r"keep_best='three/acc' is not measured .* one/acc, one/acc_norm"):
        train(CONFIG, TRAIN, HParams(), data=data, run=tmp_path / "run", steps=2, shell=options)

"""Rows come in exact shares, every window once per epoch, and a batch depends on the seed and the step alone."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from model.errors import InputError
from train import TrainConfig
from train.data import Loader, PhasedLoader
from train.data.mixture import LONGEST_BLOCK, Mixture
from train.data.rows import rows_of
from train.data.shards import TokenShards
from train.phases import Phase
from train.plan import Plan

WEIGHTS = (
    {"a": 1},
    {"a": 0.3, "b": 0.7},
    {"a": 2, "b": 1},
    {"a": 0.45, "b": 0.35, "c": 0.2},
    {"a": 0.123456, "b": 0.31415, "c": 0.562394},
    {"a": 0.998, "b": 0.002},
)


class Numbers(TokenShards):
    """A source whose tokens say where they stand: 1000 · its number + place."""

    def __init__(self, number, tokens, eos_id=999_999):
        self.folder, self.split, self.eos_id = Path(f"source{number}"), "train", eos_id
        self.manifest = SimpleNamespace(kind="text", tokenizer_files={"tokenizer.model": str(eos_id)})
        self._tokens = 1000 * number + np.arange(tokens, dtype=np.int32)

    def __len__(self):
        return len(self._tokens)

    def windows(self, starts, length):
        assert starts.min() >= 0
        assert starts.max() + length <= len(self)
        return self._tokens[starts[:, None] + np.arange(length)]


SOURCES = {"web": Numbers(1, 371), "books": Numbers(2, 204)}  # 37 and 20 windows of 10
MIXED = (("web", 0.3), ("books", 0.7))
PHASES = (
    Phase("warm-up", 200, batch_sizes=(2,)),
    Phase("bulk", 900, batch_sizes=(2, 5)),
    Phase("mixed", 2000, mixture=MIXED),
    Phase("long", 400, seq_len=20, mixture=MIXED),
    Phase("back", 300, mixture=(("web", 2.0),)),
    Phase("mixed again", 1000, mixture=MIXED),
)
TRAIN = TrainConfig(batch_size=4, seq_len=10, phases=PHASES)
PLAN = Plan.of(TRAIN)


def loader(seed=3, plan=PLAN, **options):
    return PhasedLoader(SOURCES, plan, seed=seed, **options)


def firsts(batches):
    """The first token of every row."""
    return np.concatenate([batch["tokens"][:, 0] for batch in batches])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_block_has_exact_counts(weights):
    mixture = Mixture(weights, seed=5)
    assert mixture.block <= LONGEST_BLOCK
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert np.abs(mixture.counts / mixture.block - shares).max() < 1 / LONGEST_BLOCK
    orders = set()
    for block in range(4):
        source, rows = mixture.split(np.arange(block * mixture.block, (block + 1) * mixture.block))
        orders.add(source.tobytes())
        for number, count in enumerate(mixture.counts):
            own = np.sort(rows[source == number])
            assert np.array_equal(own, np.arange(block * count, (block + 1) * count)), "no gap, no repeat"
    assert len(orders) == (4 if len(weights) > 1 else 1), "every block has an order of its own"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_is_close_to_the_weights(weights):
    mixture = Mixture(weights, seed=1)
    source, _ = mixture.split(np.arange(3000))
    for number, weight in enumerate(weights.values()):
        share = weight / sum(weights.values())
        drift = np.cumsum(source == number) - share * np.arange(1, 3001)
        spread = np.sqrt(share * (1 - share) * mixture.block / 4)  # of a draw without replacement, half way
        assert np.abs(drift).max() <= 5 * spread + 3
    for rows in (0, 1, 99, 100, 101, 2500):
        counted = np.bincount(source[:rows], minlength=len(weights)).tolist()
        assert list(mixture.drawn(rows).values()) == counted


def test_weights_too_small_to_count_are_refused():
    with pytest.raises(InputError, match="'b' is less than 1/1000"):
        Mixture({"a": 1.0, "b": 1e-5}, seed=0)


@pytest.mark.parametrize("segment_documents", [False, True])
def test_one_source_and_one_stage_is_the_plain_loader(data, segment_documents):
    shards = TokenShards(data)
    train_config = TrainConfig(batch_size=8, seq_len=32, segment_documents=segment_documents)
    plain = Loader(shards, batch_size=8, seq_len=32, seed=11, segment_documents=segment_documents)
    for train in (train_config, train_config.replace(phases=(Phase("all", 10**6, mixture=(("text", 3.0),)),))):
        phased = PhasedLoader({"text": shards}, Plan.of(train, 1000), seed=11, rows=rows_of(train))
        for step in (0, 1, 7, 500, 5000):
            assert same(plain.batch(step), phased.batch(step))
            assert plain.epoch(step) == phased.epoch(step)
            assert phased.sources_drawn(step) == {"text": step * 8 * 32}


def test_a_batch_is_a_function_of_seed_and_step():
    batches = [loader().batch(step) for step in range(PLAN.total_steps)]
    again = loader()
    for step in reversed(range(PLAN.total_steps)):
        stage = PLAN.stage(step)
        assert batches[step]["tokens"].shape == (stage.batch_size, stage.seq_len)
        assert same(again.batch(step), batches[step])
    other = [loader(seed=4).batch(step) for step in range(PLAN.total_steps)]
    for stage in PLAN.stages:
        steps = slice(stage.first_step, stage.end_step)
        assert not np.array_equal(firsts(batches[steps]), firsts(other[steps]))


def test_a_stream_goes_on_where_it_stopped():
    batches = [loader().batch(step) for step in range(PLAN.total_steps)]
    of = lambda *names: firsts(batches[step] for step in range(PLAN.total_steps) if PLAN.stage(step).phase in names)
    plain = Loader(SOURCES["web"], batch_size=1, seq_len=10, seed=3)
    first = of("warm-up", "bulk")
    assert np.array_equal(first, firsts(plain.batch(row) for row in range(len(first)))), "batches of any size"
    mixed = of("mixed", "mixed again")
    alone = loader(plan=Plan.of(TRAIN.replace(phases=(PHASES[0], Phase("mixed", 10 * len(mixed), mixture=MIXED)))))
    at = PLAN.stages[0].steps
    assert np.array_equal(mixed, firsts(alone.batch(at + step) for step in range(len(mixed) // 4)))
    back = of("back")
    assert not np.array_equal(back, first[: len(back)]), "another mixture has orders of its own"


def test_every_window_is_drawn_once_per_epoch():
    """In a mixture over so many blocks that both sources end an epoch: web 30 · 37 rows, books 70 · 37."""
    blocks = 37 * 2
    plan = Plan.of(TRAIN.replace(batch_size=100, phases=(Phase("all", 1000 * blocks, mixture=MIXED),)))
    drawn = loader(plan=plan)
    counts = dict(zip(*np.unique(firsts(drawn.batch(step) for step in range(blocks)), return_counts=True), strict=True))
    web = {1000 + 10 * window: 60 for window in range(37)}
    books = {2000 + 10 * window: 259 for window in range(20)}
    assert counts == web | books
    assert drawn.epoch(blocks) == 60
    assert drawn.sources_drawn(blocks) == {"web": 60 * 370, "books": 259 * 200}


def test_the_books_count_what_was_drawn():
    counted = {"web": 0, "books": 0}
    epochs = 0.0
    drawn = loader()
    for step in range(PLAN.total_steps):
        assert drawn.sources_drawn(step) == counted
        assert drawn.epoch(step) == pytest.approx(epochs)
        seq_len = PLAN.stage(step).seq_len
        tokens = drawn.batch(step)["tokens"]
        web = int((tokens[:, 0] < 2000).sum())
        counted["web"] += web * seq_len
        counted["books"] += (len(tokens) - web) * seq_len
        epochs += web / {10: 37, 20: 18}[seq_len]
    assert sum(counted.values()) == PLAN.total_tokens


def test_hosts_load_their_rows_only():
    segmented = rows_of(TRAIN.replace(segment_documents=True))
    for step in (0, 40, 120, 180):
        whole = loader(rows=segmented).batch(step)
        size = len(whole["tokens"])
        parts = [loader(rows=segmented).batch(step, slice(start, start + 1)) for start in range(size)]
        assert same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_skipped_rows_are_passed_over():
    """A stream with a gap: the batch is the one that would have come later, in the step's own shape."""
    plan = Plan.of(TrainConfig(batch_size=4, seq_len=10), 50)
    drawn = PhasedLoader(SOURCES, plan, seed=3)
    assert same(drawn.batch(20, skipped_rows=12), drawn.batch(23))
    last = PLAN.stages[1].last_step
    assert loader().batch(last, skipped_rows=100)["tokens"].shape == loader().batch(last)["tokens"].shape


def test_sources_must_fit_the_plan():
    with pytest.raises(InputError, match="unknown source of phase 'mixed' 'books'"):
        PhasedLoader({"web": SOURCES["web"]}, PLAN, seed=0)
    with pytest.raises(InputError, match="different tokenizers"):
        PhasedLoader({**SOURCES, "code": Numbers(3, 500, eos_id=0)}, PLAN, seed=0)
    with pytest.raises(InputError, match="corpus too small"):
        PhasedLoader({"web": SOURCES["web"], "books": Numbers(2, 15)}, PLAN, seed=0)
    with pytest.raises(InputError, match="at least one source"):
        PhasedLoader({}, PLAN, seed=0)
    with pytest.raises(InputError, match="seed=-1"):
        loader(seed=-1)

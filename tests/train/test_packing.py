"""Packed rows hold whole documents: each prediction once per epoch, hardly a slot empty, no word between neighbours."""

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from model import InputError, ModelConfig, init, presets
from model.errors import UnknownNameError
from train import HParams, Shell, TrainConfig, train
from train.data import PhasedLoader
from train.data.packing import best_fit_decreasing
from train.data.rows import PackedDocuments, Windows, rows_of
from train.data.shards import TokenShards
from train.objectives import LanguageModeling
from train.plan import Plan
from train.step import gradients

END = 0


class Documents(TokenShards):
    """Documents of these lengths, end tokens included, in files that end at these places.

    A token is where it stands, counted from 1, so that no two are alike but the end tokens.
    """

    def __init__(self, lengths, borders=()):
        self.folder, self.split, self.eos_id = Path("made"), "train", END
        self.manifest = SimpleNamespace(kind="text", tokenizer_files={"tokenizer.model": "one"})
        self.ends = np.cumsum(lengths) - 1
        tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
        tokens[self.ends] = END
        self._arrays = np.split(tokens, borders)
        self._starts = np.cumsum([0, *map(len, self._arrays)]).tolist()

    def documents(self):
        return np.split(np.concatenate(self._arrays), self.ends + 1)


def everything(rows):
    return rows.take(np.arange(len(rows)))


def pieces(batch):
    """(tokens, targets) of every segment of every row, in order."""
    for tokens, targets, ids in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
        for number in range(1, ids.max() + 1):
            yield tokens[ids == number], targets[ids == number]


def short_chats(count=3000):
    return np.maximum(2, np.random.default_rng(0).lognormal(4.0, 0.7, count)).astype(int)


@pytest.mark.parametrize("seed", range(12))
def test_every_prediction_is_made_once_and_no_document_that_fits_is_divided(seed):
    """Documents of any length, with no text at all, of just a row, of several, and a last one without an end token."""
    random = np.random.default_rng(seed)
    seq_len = int(random.integers(1, 20))
    lengths = [*random.integers(1, 3 * seq_len, random.integers(1, 60)), 1, 2, seq_len, seq_len + 1, seq_len + 2]
    shards = Documents(lengths, borders=np.sort(random.integers(0, sum(lengths), 5)))
    if seed % 2:
        shards._arrays[-1][-1:] = sum(lengths)
    rows = PackedDocuments(shards, seq_len)
    batch = everything(rows)
    expected = [pair for text in shards.documents() for pair in itertools.pairwise(text)]
    found = [pair for tokens, targets in pieces(batch) for pair in zip(tokens, targets, strict=True)]
    assert sorted(found) == sorted(expected)

    whole = {tuple(tokens) for tokens, _ in pieces(batch)}
    for text in shards.documents():
        parts = [text[start : min(start + seq_len, len(text) - 1)] for start in range(0, len(text) - 1, seq_len)]
        assert all(tuple(part) in whole for part in parts)

    ids, real = batch["segment_ids"], batch["loss_mask"] == 1
    assert np.array_equal(real, ids > 0)
    assert all((batch[name][~real] == 0).all() for name in batch), "unfilled slots are zero throughout"
    assert np.isin(np.diff(np.where(real, ids, ids.max(axis=1, keepdims=True)), axis=1), (0, 1)).all()
    for row, positions in zip(ids, batch["positions"], strict=True):
        for number in range(1, row.max() + 1):
            assert np.array_equal(positions[row == number], np.arange((row == number).sum()))

    slots = np.array([max(len(text) - 1, 0) for text in shards.documents()])
    statistics = rows.statistics
    assert statistics.tokens == sum(lengths)
    assert statistics.divided == (slots > seq_len).sum()
    assert statistics.rows == len(rows) == len(batch["tokens"])
    assert statistics.fill == pytest.approx(real.mean())
    assert statistics.cropped == 0


def plain_best_fit(lengths, capacity):
    """Pack items one by one, and return the room left in each bin."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda number: rooms[number])] -= length
    return rooms


@pytest.mark.parametrize("capacity", [1, 7, 40, 300])
def test_many_at_once_are_packed_as_one_by_one(capacity):
    """Either of two bins with equal room may be chosen, so the room left in all bins is compared."""
    random = np.random.default_rng(capacity)
    for lengths in (
        np.zeros(0, np.int64),
        random.integers(1, capacity + 1, 1),
        random.integers(1, capacity + 1, 200),
        1 + random.geometric(0.1, 200) % capacity,
    ):
        bins = best_fit_decreasing(lengths, capacity)
        rooms = capacity - np.bincount(bins, lengths)
        assert (rooms >= 0).all()
        assert sorted(rooms) == sorted(plain_best_fit(lengths.tolist(), capacity))


def test_rows_are_full(data):
    corpus, chats = PackedDocuments(TokenShards(data), 128), PackedDocuments(Documents(short_chats()), 256)
    for rows in (corpus, chats):
        assert rows.statistics.fill >= 0.99
        assert rows.statistics.cropped == 0
        assert everything(rows)["loss_mask"].mean() == pytest.approx(rows.statistics.fill)
    assert chats.statistics.divided > 0
    assert "3,000 documents" in chats.statistics.describe()
    assert corpus.statistics.documents == TokenShards(data).manifest.splits["train"].documents


def test_the_packing_depends_on_the_tokens_alone():
    lengths = short_chats(300)
    whole = everything(PackedDocuments(Documents(lengths), 64))
    config, shape = presets.get("tiny"), TrainConfig(packing="best-fit")
    spec = LanguageModeling().batch_spec(config, shape, *next(iter(whole.values())).shape)
    for borders in ((), (1, 7, 7, 500, 900, 901)):
        again = everything(PackedDocuments(Documents(lengths, borders), 64))
        assert all(np.array_equal(whole[name], again[name]) for name in whole)
        assert {name: (value.shape, value.dtype) for name, value in again.items()} == {
            name: (array.shape, array.dtype) for name, array in spec.items()
        }


def test_the_seed_orders_the_rows():
    """In a run every row is drawn once per epoch, whatever its seed; the epochs count rows."""
    shards = Documents(short_chats(300))
    train_config = TrainConfig(batch_size=4, seq_len=64, packing="best-fit")
    count = len(PackedDocuments(shards, 64))
    orders = []
    for seed in (1, 2):
        loader = PhasedLoader({"made": shards}, Plan.of(train_config, 1000), seed=seed, rows=rows_of(train_config))
        steps = -(-count // 4)
        drawn = np.concatenate([loader.batch(step)["tokens"] for step in range(steps)])[:count]
        orders.append([row.tobytes() for row in drawn])
        part = loader.batch(3, slice(1, 3))
        assert all(np.array_equal(values[1:3], part[name]) for name, values in loader.batch(3).items())
        assert loader.epoch(steps) == steps * 4 / count
    assert orders[0] != orders[1]
    packed = [row.tobytes() for row in everything(PackedDocuments(shards, 64))["tokens"]]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(packed)


# ---- what a model makes of them

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=16, position="learned"
)


@functools.cache
def tools():
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    return params, jax.jit(gradients, static_argnums=(0, 1))


def loss_and_gradient(batch):
    params, of = tools()
    grads, metrics = of(CONFIG, TrainConfig(norms=False), params, batch, HParams())
    return float(metrics["loss"]), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])


def row_of(*texts):
    """The documents in one row of 16 slots, as they come."""
    shards = Documents([len(text) + 1 for text in texts])
    shards._arrays = [np.concatenate([np.append(text, END) for text in texts])]
    batch = everything(PackedDocuments(shards, 16))
    assert len(batch["tokens"]) == 1
    return batch


def only(batch, segment):
    """The same row, with the loss of one document alone."""
    return batch | {"loss_mask": (batch["segment_ids"] == segment).astype(np.float32)}


def test_a_document_in_a_packed_row_is_as_alone():
    random = np.random.default_rng(0)
    long, short, other = (random.integers(1, 32, length) for length in (8, 6, 8))
    packed = row_of(long, short)
    assert packed["segment_ids"].tolist() == [[1] * 8 + [2] * 6 + [0] * 2], "each takes its n - 1 slots"
    loss, gradient = loss_and_gradient(packed)
    alone = [loss_and_gradient(row_of(text)) for text in (long, short)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    for segment, (own_loss, own_gradient) in enumerate(alone, 1):
        here_loss, here_gradient = loss_and_gradient(only(packed, segment))
        close(here_loss, own_loss)
        close(here_gradient, own_gradient, atol=1e-6 * np.linalg.norm(own_gradient))
    close(loss, (8 * alone[0][0] + 6 * alone[1][0]) / 14)
    close(gradient, (8 * alone[0][1] + 6 * alone[1][1]) / 14, atol=1e-6 * np.linalg.norm(gradient))

    before, after = (loss_and_gradient(only(row_of(text, short), 2)) for text in (long, other))
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1]), "another neighbour changes no bit"
    assert loss_and_gradient(row_of(long, short))[0] != loss_and_gradient(row_of(other, short))[0]


def test_a_packed_run_that_crashed_is_the_one_that_did_not(data, tmp_path, crash, record, capsys):
    config = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, num_layers=1)
    train_config = TrainConfig(batch_size=4, seq_len=32, norms=False, packing="best-fit")
    shell = Shell(evaluate_tokens=128, checkpoint_every=2, announce=True)
    go = lambda run: train(config, train_config, HParams(), data=data, run=tmp_path / run, steps=6, shell=shell)
    assert go("whole").status == "finished"
    said = capsys.readouterr().err
    assert f"packing of data: {PackedDocuments(TokenShards(data), 32).statistics.describe()}" in said
    with crash(4):
        go("crashed")
    assert go("crashed").status == "finished"
    assert record(tmp_path / "crashed") == record(tmp_path / "whole")


def test_bad_inputs():
    with pytest.raises(UnknownNameError, match="packing 'best'"):
        TrainConfig(packing="best")
    with pytest.raises(InputError, match="nothing to pack: no document of the train split of made has two tokens"):
        PackedDocuments(Documents([1, 1]), 8)
    assert TrainConfig(packing="best-fit").tells_documents_apart
    assert not TrainConfig().tells_documents_apart
    assert isinstance(rows_of(TrainConfig())(Documents([9]), 2), Windows)

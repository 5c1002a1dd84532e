"""Batches are a function of (seed, step), each token is predicted once per epoch, no shard border shows."""

import numpy as np
import pytest

from model.errors import InputError
from train.data import Loader, prepare, validation_batches
from train.data.permutation import permute
from train.data.rows import segments
from train.data.shards import TokenShards


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("corpus")
    words = ["one", "two", "three", "people", "government", "nation", "free", "\n"]
    for i in range(200):
        (folder / f"{i:03}.txt").write_text(f"{i} " + " ".join(generator.choice(words, size=5 + i % 40)))
    return folder


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "whole"
    prepare(corpus, out, vocab_size=290, validation_fraction=0.2)
    return out


@pytest.fixture(scope="module")
def sharded(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "sharded"
    manifest = prepare(corpus, out, vocab_size=290, validation_fraction=0.2, shard_tokens=37)
    assert len(manifest.splits["train"].shards) > 50
    return out


def all_tokens(data, split):
    shards = TokenShards(data, split)
    return shards.windows(np.array([0]), len(shards))[0]


@pytest.mark.parametrize("size", [*range(1, 70), 100, 1000, 1025, 4097])
def test_permutation_is_a_bijection(size):
    index = np.arange(size)
    orders = set()
    for seed in (0, 1, 7, 2**64 - 1):
        for epoch in (0, 1, 10**6):
            order = permute(index, size, seed, np.full(size, epoch))
            assert np.array_equal(np.sort(order), index)
            orders.add(order.tobytes())
    assert len(orders) == 12 or size < 10


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_permutation_is_uniform(size):
    """Over the epochs of several seeds."""
    epochs, seeds = 100, 10
    draws, index = epochs * seeds, np.tile(np.arange(size), epochs)
    counts = np.zeros((size, size))
    for seed in range(seeds):
        np.add.at(counts, (index, permute(index, size, seed, np.repeat(np.arange(epochs), size))), 1)
    chi_squared = ((counts - draws / size) ** 2).sum() / (draws / size)
    degrees = (size - 1) ** 2
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


def test_permutation_epochs_mix_in_one_call():
    index, epoch = np.arange(50) % 25, np.arange(50) // 25
    mixed = permute(index, 25, 3, epoch)
    for e in (0, 1):
        assert np.array_equal(mixed[epoch == e], permute(index[epoch == e], 25, 3, epoch[epoch == e]))


def test_batch_is_a_pure_function_of_seed_and_step(data):
    def loader(seed):
        return Loader(data, batch_size=4, seq_len=16, seed=seed, segment_documents=True)

    forward, backward = loader(1), loader(1)
    batches = [forward.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        again = backward.batch(step)
        assert again.keys() == batches[step].keys()
        for name, array in again.items():
            assert np.array_equal(array, batches[step][name])
    assert not np.array_equal(loader(2).batch(0)["tokens"], batches[0]["tokens"])


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 16), (4, 16), (7, 5)])
def test_every_token_is_predicted_once_per_epoch(data, batch_size, seq_len):
    loader = Loader(data, batch_size=batch_size, seq_len=seq_len, seed=0)
    stream = all_tokens(data, "train")
    assert loader.rows_per_epoch == (len(stream) - 1) // seq_len
    assert loader.tokens_per_epoch == loader.rows_per_epoch * seq_len
    expected = stream[1 : 1 + loader.tokens_per_epoch].reshape(-1, seq_len)
    steps = range(-(-2 * loader.rows_per_epoch // batch_size))
    targets = np.concatenate([loader.batch(step)["targets"] for step in steps])
    first, second = targets[: len(expected)], targets[len(expected) : 2 * len(expected)]
    assert sorted(map(bytes, first)) == sorted(map(bytes, expected)) == sorted(map(bytes, second))
    assert not np.array_equal(first, second), "two epochs in the same order"
    assert loader.epoch(0) == 0
    assert loader.epoch(loader.rows_per_epoch) == batch_size


def test_targets_are_the_next_tokens(data):
    batch = Loader(data, batch_size=8, seq_len=12, seed=5).batch(3)
    assert set(batch) == {"tokens", "targets"}
    assert all(a.dtype == np.int32 and a.shape == (8, 12) and a.flags.c_contiguous for a in batch.values())
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    stream = all_tokens(data, "train").tobytes()
    for tokens, target in zip(batch["tokens"], batch["targets"][:, -1:], strict=True):
        assert np.concatenate([tokens, target]).tobytes() in stream


def test_shard_borders_are_invisible(data, sharded):
    for split in ("train", "validation"):
        assert np.array_equal(all_tokens(data, split), all_tokens(sharded, split))
    whole, cut = (
        Loader(folder, batch_size=8, seq_len=50, seed=0, segment_documents=True) for folder in (data, sharded)
    )
    for step in range(10):
        for name, array in whole.batch(step).items():
            assert np.array_equal(array, cut.batch(step)[name])


def test_segments():
    tokens = np.array([[5, 6, 2, 7, 2, 2, 8], [2, 1, 1, 1, 1, 1, 1]], np.int32)
    result = segments(tokens, 2)
    assert result["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 4], [1, 2, 2, 2, 2, 2, 2]]
    assert result["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert result["loss_mask"].tolist() == [[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]]
    assert [result[name].dtype for name in result] == [np.int32, np.int32, np.float32]


@pytest.mark.parametrize("max_tokens", [None, 1, 100, 333])
def test_validation_is_the_same_tokens_for_every_shape(data, max_tokens):
    stream = all_tokens(data, "validation")
    count = len(stream) - 1 if max_tokens is None else max_tokens
    for batch_size, seq_len in [(1, 8), (4, 16), (3, 50)]:
        batches = validation_batches(data, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens)
        assert len({tuple((name, a.shape, a.dtype) for name, a in batch.items()) for batch in batches}) == 1
        mask = np.concatenate([batch["loss_mask"].reshape(-1) for batch in batches]) > 0
        targets = np.concatenate([batch["targets"].reshape(-1) for batch in batches])
        tokens = np.concatenate([batch["tokens"].reshape(-1) for batch in batches])
        assert np.array_equal(targets[mask], stream[1 : count + 1])
        assert np.array_equal(tokens[mask], stream[:count])
        assert len(mask) - mask.sum() < batch_size * seq_len


def test_validation_segments(data):
    plain = validation_batches(data, batch_size=4, seq_len=16)
    batches = validation_batches(data, batch_size=4, seq_len=16, segment_documents=True)
    for a, b in zip(plain, batches, strict=True):
        assert np.array_equal(b["segment_ids"] == 0, a["loss_mask"] == 0), "padding is segment 0"
        assert np.array_equal(b["loss_mask"], a["loss_mask"] * (a["tokens"] != 2))


def test_bad_inputs(data):
    with pytest.raises(InputError, match=r"corpus too small: the train split of .* needs 1000001"):
        Loader(data, batch_size=1, seq_len=10**6, seed=0)
    with pytest.raises(InputError, match="corpus too small: the validation split"):
        validation_batches(data, batch_size=1, seq_len=10**6)
    for name in ("batch_size", "seq_len"):
        with pytest.raises(InputError, match=f"{name}=0"):
            Loader(data, **{"batch_size": 1, "seq_len": 1, "seed": 0, name: 0})
    with pytest.raises(InputError, match="max_tokens=0"):
        validation_batches(data, batch_size=1, seq_len=8, max_tokens=0)
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match=f"seed={seed} must be a whole number"):
            Loader(data, batch_size=1, seq_len=8, seed=seed)
    with pytest.raises(InputError, match="step=-1"):
        Loader(data, batch_size=1, seq_len=8, seed=0).batch(-1)
    with pytest.raises(InputError, match="unknown split 'test'"):
        TokenShards(data, "test")
    for start in (-1, 10**9):
        with pytest.raises(InputError, match="are outside the train split"):
            TokenShards(data).windows(np.array([start]), 4)

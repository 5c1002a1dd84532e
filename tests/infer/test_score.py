"""Scores are the log-probabilities of whole passes, however requests are batched, ordered and branched."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from infer import prepare, score
from infer.scoring.batches import MOST_PROGRAMS, Limits, Prefix, ScoredRow, padded_length, plan_branches
from infer.scoring.packing import packed_arrays, plan_packed
from infer.scoring.prefixes import SharedPrefix, packed_prefixes, shared_prefixes
from infer.scoring.programs import read_prefixes, score_packed, score_rows
from model import Experts, InputError, Latent, ModelConfig, apply

whole = jax.jit(apply, static_argnums=0)
BASE = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=128, eos_token_ids=(3,)
)
IDEAS = {
    "windows-and-sinks": BASE.replace(sliding_window=5, layer_pattern=("local", "global"), attention_sinks=True),
    "latent-and-experts": BASE.replace(
        num_kv_heads=None,
        latent=Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5),
        experts=Experts(count=4, top_k=2, d_ff=12, dispatch="capacity", capacity_factor=0.5),
    ),
    "encoder-decoder": BASE.replace(stack="encoder-decoder", position="relative", decoder_start_token_id=5),
}


def drawn(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 32, length).tolist() for length in lengths]


def requests(prefix=40):
    """Four continuations of one long context, one context that begins like it, a short one, and an empty one."""
    long, *continuations = drawn(prefix, 1, 3, 5, 2)
    other = [*long[:-5], *drawn(4, seed=2)[0]]
    return [*((long, one) for one in continuations), (other, [7, 8]), *zip(drawn(3, 0), drawn(6, 2), strict=True)]


def expected(config, params, pairs):
    """Log-probabilities [len(continuation), vocab] of every request, from one pass over its whole row."""
    if config.experts is not None:  # nothing is dropped at inference
        config = config.replace(experts=config.experts.replace(dispatch="dropless"))
    pairs = [(context or list(config.eos_token_ids[:1]), continuation) for context, continuation in pairs]
    inputs = {}
    if config.stack == "encoder-decoder":
        inputs = {"encoder_tokens": padded([context for context, _ in pairs])}
        lengths = np.array([len(context) for context, _ in pairs])
        inputs["encoder_segment_ids"] = (np.arange(48) < lengths[:, None]).astype(np.int32)
        inputs["segment_ids"] = np.ones((len(pairs), 48), np.int32)
        pairs = [([config.decoder_start_token_id], continuation) for _, continuation in pairs]
    logits = whole(config, params, padded([[*context, *continuation] for context, continuation in pairs]), **inputs)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    return [row[len(c) - 1 : len(c) - 1 + len(t)] for row, (c, t) in zip(logprobs, pairs, strict=True)]


def padded(rows, width=48):
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def programs():
    return sum(one._cache_size() for one in (read_prefixes, score_rows, score_packed))


@contextlib.contextmanager
def planned(way):
    """The plan of decoders packs everything, or nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "packed":
            patch.setattr("infer.scoring.planning.shared_prefixes", lambda *_: ([], []))
            patch.setattr("infer.scoring.planning.WORTH_BRANCHING", 1e9)
        else:
            patch.setattr("infer.scoring.planning.plan_packed", lambda *_: [])
        yield


def check_scores_are_those_of_whole_passes(config, params):
    pairs = requests()
    wanted = expected(config, params, pairs)
    ways = {"whole": score_rows, "cached": read_prefixes}
    if config.stack == "decoder":
        ways["packed"] = score_packed
    for way, program in ways.items():
        compiled, of_way = programs(), program._cache_size()
        with planned(way):
            found = score(config, params, pairs, share_prefixes=way != "whole")
        assert 1 <= programs() - compiled <= MOST_PROGRAMS
        assert program._cache_size() > of_way
        for (_, continuation), tokens, total, greedy, rows in zip(
            pairs, found.tokens, found.logprobs, found.greedy, wanted, strict=True
        ):
            close(tokens, rows[np.arange(len(continuation)), continuation])
            close(total, sum(tokens))
            assert greedy == (rows.argmax(-1) == continuation).all()


@pytest.mark.parametrize("config", IDEAS.values(), ids=IDEAS)
def test_scores_are_those_of_whole_passes(config, random_params):
    check_scores_are_those_of_whole_passes(config, random_params(config))


@pytest.mark.long
def test_scores_of_every_architecture_are_those_of_whole_passes(variant, random_params):
    if variant.stack == "encoder":
        with pytest.raises(InputError, match="predicts no next token"):
            score(variant, random_params(variant), [([1], [2])])
        return
    config = variant.replace(max_seq_len=64, eos_token_ids=(3,))
    check_scores_are_those_of_whole_passes(config, random_params(config))


def many():
    """Questions of several answers after one stem, one without it, and requests that share nothing, of many lengths."""
    stem, *questions = drawn(66, 22, 30, 25, 19, 28)
    shared = [([*stem, *question], one) for question in questions for one in drawn(1, 3, 2, 3, seed=len(question))]
    shared += [(drawn(70, seed=5)[0], one) for one in drawn(2, 1, 4, seed=6)]
    return [*shared, *zip(drawn(5, 60, 17, 33, seed=3), drawn(4, 9, 1, 30, seed=4), strict=True)]


@pytest.mark.parametrize("way", ["cached", "packed"])
def test_neither_the_order_nor_the_batch_size_counts_and_programs_are_few(random_params, way):
    """With a window that a stem does not fill and a prefix does."""
    config = BASE.replace(sliding_window=80, layer_pattern=("local", "global"))
    params, pairs, compiled = random_params(config), many(), programs()
    with planned(way):
        once = score(config, params, pairs)
        assert programs() - compiled <= MOST_PROGRAMS
        assert read_prefixes._cache_size() >= 1, "the stem"
        order = np.random.default_rng(0).permutation(len(pairs))
        again = score(config, params, [pairs[index] for index in order])
        np.testing.assert_array_equal(again.logprobs, once.logprobs[order])
        assert programs() - compiled <= MOST_PROGRAMS, "of few lengths"
        close(score(config, params, pairs, share_prefixes=False).logprobs, once.logprobs)
        close(score(config, params, pairs, batch_size=5).logprobs, once.logprobs)
        if way == "cached":
            for index in (0, len(pairs) - 1):
                close(score(config, params, [pairs[index]]).logprobs, once.logprobs[index : index + 1])


def test_the_likeliest_tokens_and_greedy_continuations(random_params):
    params, (context, *_) = random_params(BASE), drawn(40)
    first = score(BASE, params, [(context, [0])], top_k=32).top_logprobs[0][0]
    best, second = list(first)[:2]
    pairs = [(context, [best]), (context, [second, 1]), (context, [best, *drawn(2)[0]])]
    found = score(BASE, params, pairs, top_k=3)
    wanted = expected(BASE, params, pairs)
    np.testing.assert_array_equal(found.greedy[:2], [True, False])
    assert [[list(one) for one in of_request] for of_request in found.top_logprobs] == [
        np.argsort(-rows, axis=-1)[:, :3].tolist() for rows in wanted
    ]
    for of_request, rows in zip(found.top_logprobs, wanted, strict=True):
        close([list(one.values()) for one in of_request], -np.sort(-rows, axis=-1)[:, :3])
    assert found.top_logprobs[0][0][best] == pytest.approx(first[best], abs=1e-5)
    assert score(BASE, params, pairs).top_logprobs == []


def test_of_equally_likely_tokens_the_first_is_greedy(random_params):
    config = BASE.replace(tie_embeddings=False)
    params = jax.tree.map(np.array, random_params(config))
    params["head"]["weight"][:] = 0
    np.testing.assert_array_equal(score(config, params, [([1], [0, 0]), ([1], [0, 4])]).greedy, [True, False])


def test_prepared_parameters_and_work_in_pieces_change_nothing(random_params, monkeypatch):
    params, pairs = random_params(BASE), requests()
    wanted = score(BASE, params, pairs).logprobs
    close(score(BASE, prepare(BASE, params), pairs).logprobs, wanted)
    monkeypatch.setattr("infer.scoring.programs._MOST_LOGITS", 600)
    monkeypatch.setattr("infer.scoring.programs.CHUNK", 16)
    narrow = BASE.replace(norm_epsilon=1.001e-5)  # a config of its own: other programs
    close(score(narrow, params, pairs).logprobs, score(BASE, params, pairs, batch_size=8).logprobs)


def test_arrays_generators_equal_requests_and_no_requests(random_params):
    params, pairs = random_params(BASE), requests()[:2]
    given = (pair for pair in [*pairs, tuple(map(np.array, pairs[0]))])
    found = score(BASE, params, given, batch_size=np.int64(16), top_k=np.int64(0))
    assert found.logprobs[2] == found.logprobs[0]
    nothing = score(BASE, params, [])
    assert (nothing.logprobs.shape, nothing.tokens, nothing.greedy.shape) == ((0,), [], (0,))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([1], []), "request 1 has an empty continuation"),
        (([1] * 100, [2] * 30), "request 1: 100 tokens of context and 30 of continuation.* max_seq_len=128"),
        (([1, 32], [2]), "request 1: its context has the id 32, outside the vocabulary of 32"),
        (([1], [2, -1]), "request 1: its continuation has the id -1, outside"),
        (([1.0], [2]), r"request 1: its context is \[1.0\]; give a flat list of token ids, whole numbers"),
        (([1], [[2], [3, 4]]), "request 1: its continuation is .* flat list"),
        (("a question", "an answer"), "request 1: its context is 'a question'"),
        ("ab", r"request 1 is 'ab'; give \(context ids, continuation ids\)"),
        (([1], [2], [3]), "request 1 is .*; give"),
    ],
)
def test_a_request_that_cannot_be_scored_is_named(pair, message):
    with pytest.raises(InputError, match=message):
        score(BASE, {}, [([1], [2]), pair])


def test_other_bad_input_raises():
    with pytest.raises(InputError, match="request 0 has an empty context and the config no eos_token_ids"):
        score(BASE.replace(eos_token_ids=()), {}, [([], [2])])
    with pytest.raises(InputError, match=r"request 0: its context of 129 tokens is longer than max_seq_len=128"):
        score(IDEAS["encoder-decoder"], {}, [([1] * 129, [2])])
    for config in (BASE.replace(head="scalar"), BASE.replace(stack="encoder", head="masked-language-model")):
        with pytest.raises(InputError, match="predicts no next token; score needs a decoder"):
            score(config, {}, [([1], [2])])
    for options in ({"batch_size": 0}, {"batch_size": 2.0}, {"top_k": 33}, {"top_k": -1}, {"top_k": True}):
        with pytest.raises(InputError, match=next(iter(options))):
            score(BASE, {}, [([1], [2])], **options)


def test_importing_the_package_keeps_the_function():
    import infer.scoring

    assert infer.score is infer.scoring.score


def test_shared_prefixes_leave_the_fewest_tokens_to_read():
    """By hand: 3 rows share 100 tokens, two pairs a stem of 90 and 70 more tokens each, one row shares nothing."""
    first, a, b, stem, other = (np.full(n, fill, np.int32) for n, fill in ((100, 1), (70, 2), (70, 3), (90, 4), (9, 5)))

    def row(*parts):
        return np.concatenate([*parts])

    rows = [row(first, other[:n]) for n in (1, 2, 3)]
    rows += [row(stem, a, other[:2]), row(stem, a, other[:3]), row(stem, b, other[:2]), row(stem, b, other[:3]), other]
    shareable = [100, 101, 102, 161, 162, 161, 162, 8]
    one_level, with_stems = shared_prefixes(rows, shareable)
    assert set(one_level) == {SharedPrefix(0, 3, 100), SharedPrefix(3, 5, 161), SharedPrefix(5, 7, 161)}
    assert set(with_stems) == {SharedPrefix(0, 3, 100), SharedPrefix(3, 5, 161, 90), SharedPrefix(5, 7, 161, 90)}
    assert shared_prefixes([], []) == ([], [])


def test_packed_prefixes_share_any_token_and_stems_many():
    """By hand: two pairs after a stem of 70 tokens, a pair that shares four tokens, a row that shares nothing."""
    stem, a, b, short, other = (np.full(n, fill, np.int32) for n, fill in ((70, 1), (40, 2), (40, 3), (2, 4), (9, 5)))
    parts = [(stem, a, other[:2]), (stem, a, other[:3]), (stem, b, other[:2]), (stem, b, other[:3])]
    parts += [(short, other[:3]), (short, other[:4]), (other,)]
    rows, shareable = [np.concatenate(one) for one in parts], [111, 112, 111, 112, 4, 5, 8]
    apart = [SharedPrefix(4, 6, 4), SharedPrefix(6, 7, 0)]
    found = packed_prefixes(rows, shareable, 100)
    assert set(found) == {SharedPrefix(0, 2, 111, 70), SharedPrefix(2, 4, 111, 70), *apart}
    assert packed_prefixes(rows[:2], shareable[:2], 100) == [SharedPrefix(0, 2, 111)], "little follows its 111 tokens"
    assert packed_prefixes([], [], 100) == []


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (4, 1), (16, 2)])
def test_packed_rows_hold_every_request_once_and_whole(size, parts):
    texts = sorted(([*context, *continuation] for context, continuation in many()), key=lambda text: text[:-1])
    rows = [
        ScoredRow(number, np.array(text[:-1], np.int32), np.array(text[-1:], np.int32))
        for number, text in enumerate(texts)
    ]
    limits = Limits(size, parts, 128)
    plan = plan_packed(
        rows, packed_prefixes([row.tokens for row in rows], [len(row.tokens) - 1 for row in rows], 100), limits
    )
    found = []
    for shape, batches in plan:
        for batch in batches:
            assert len(batch.rows) <= shape.rows
            arrays, places = packed_arrays(batch, shape)
            for place in places:
                row, last = divmod(arrays.predicting[place.row, place.first + place.scored - 1], shape.width)
                row += place.row * shape.rows // parts
                tree, branch = arrays.trees[row], arrays.branches[row]
                mine = (tree == tree[last]) & ((branch == 0) | (branch == branch[last]))
                tokens = [*batch.stem, *arrays.tokens[row][mine]]
                positions = arrays.positions[row][mine]
                np.testing.assert_array_equal(tokens, rows[place.number].tokens)
                np.testing.assert_array_equal(positions, np.arange(len(batch.stem), len(tokens)))
                assert arrays.targets[place.row, place.first] == rows[place.number].targets[0]
                found.append(place.number)
    assert sorted(found) == list(range(len(rows)))


@pytest.mark.parametrize(
    ("counts", "limits", "size"),
    [
        ([4] * 9, Limits(16, 1, 128), 4),
        ([5] * 3, Limits(16, 1, 128), 5),
        ([4, 4, 5, 4], Limits(16, 1, 128), 5),
        ([40, 3], Limits(16, 1, 128), 5),
        ([1] * 5, Limits(16, 1, 128), 1),
        ([4] * 9, Limits(16, 8, 128), 2),
    ],
)
def test_rows_of_a_prefix_stand_together(counts, limits, size):
    """Groups of rows have the size that needs the least padding, and are on one device."""
    numbers = iter(range(sum(counts)))

    def token(number):
        return np.full(2, number, np.int32)

    rows = [
        [ScoredRow(number, token(number), token(number)) for number in itertools.islice(numbers, n)] for n in counts
    ]
    prefixes = [Prefix(token(of_one[0].number), of_one) for of_one in rows]
    found = []
    for shape, batches in plan_branches(prefixes, [], limits):
        assert shape.size == size
        assert shape.groups % limits.multiple == 0
        for batch in batches:
            assert len(batch.groups) == len(batch.parents) <= shape.groups
            assert len(batch.prefixes) <= shape.prefixes
            for group, parent in zip(batch.groups, batch.parents, strict=True):
                assert len(group) <= size
                found += [(row.number, batch.prefixes[parent].tokens[0]) for row in group]
    assert sorted(found) == [(row.number, of_one[0].number) for of_one in rows for row in of_one]


def test_padded_lengths_are_few_and_near():
    lengths = sorted({padded_length(length, 4000) for length in range(1, 4001)})
    assert len(lengths) < 75
    assert all(length <= padded_length(length, 4000) <= max(1.125 * length, length + 1) for length in range(1, 4001))
    assert padded_length(4000, 4000) == 4000


def test_a_progress_bar_is_shown_after_two_seconds(monkeypatch, random_params):
    totals, advances = [], []

    @contextlib.contextmanager
    def bar(description, total):
        totals.append(total)
        yield lambda amount=1: advances.append(amount)

    monkeypatch.setattr("infer.scoring.scores.progress_bar", bar)
    monkeypatch.setattr("infer.scoring.scores._QUIET_SECONDS", 1e9)
    score(BASE, random_params(BASE), many(), batch_size=5)
    assert totals == []
    monkeypatch.setattr("infer.scoring.scores._QUIET_SECONDS", 0.0)
    score(BASE, random_params(BASE), many(), batch_size=5)
    assert totals == [sum(advances)]


def errors_over_meshes(devices, *commands):
    """{case: largest error} of one process or several at the same time, each with its own arguments."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    program = [sys.executable, Path(__file__).with_name("scored_over_meshes.py")]
    options = {"env": os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*program, *command], **options, **pipes) for command in commands]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in said)
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.mark.long
def test_meshes_score_as_one_device_does():
    (found,) = errors_over_meshes(8, [])
    assert len(found) == 5
    assert max(found.values()) < 1e-5, found


@pytest.mark.long
def test_each_of_two_processes_has_all_scores():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    for found in errors_over_meshes(1, [coordinator, "0"], [coordinator, "1"]):
        assert found["processes"] < 1e-5

"""What the prefix cache gives back is what was stored for just these tokens; the engine reads only the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer.engine
from infer import Sampling
from infer.engine import Engine
from infer.prefix_cache import NO_PREFIX, PrefixCache
from model import InputError, ModelConfig, init_cache
from model.accounting import kv_cache_bytes

BLOCK, CAPACITY = 4, 30
CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=96,
    sliding_window=6,
    layer_pattern=("local", "global"),
)
ENDLESS = Sampling(temperature=0.0, stop_ids=())


def cache_of(config, tokens, before):
    """A cache whose entry at each position is a number of the tokens up to there; elsewhere it holds `before`."""

    def fill(leaf):
        row = np.full(leaf.shape, before, leaf.dtype)
        for position in range(max(0, len(tokens) - leaf.shape[2]), len(tokens)):
            row[:, :, position % leaf.shape[2]] = hash(tuple(tokens[: position + 1])) % 1009
        return jnp.asarray(row)

    cache = init_cache(config, 1, CAPACITY)
    return cache.replace(layers=jax.tree.map(fill, cache.layers), lengths=jnp.array([len(tokens)], jnp.int32))


@pytest.mark.parametrize("window", [6, 3, None], ids=["ring-longer-than-a-block", "ring-shorter", "no-ring"])
def test_a_hit_restores_what_was_stored_for_these_tokens(window):
    """Random prompts that share beginnings, with room for six blocks, so that blocks are removed all the time."""
    config = CONFIG if window else CONFIG.replace(layer_pattern=("global",))
    config = config.replace(sliding_window=window)
    random, room = np.random.default_rng(0), 6
    prefixes = PrefixCache(config, BLOCK, room * kv_cache_bytes(config, 1, BLOCK) + 1)
    assert prefixes.rows == room
    hits, stored = [], 0
    for _ in range(120):
        prompt = random.integers(0, 2, random.integers(1, CAPACITY)).tolist()
        prompt[: 2 * BLOCK] = [0] * min(len(prompt), 2 * BLOCK) if random.random() < 0.5 else prompt[: 2 * BLOCK]
        prefix = prefixes.find(prompt)
        hits.append(prefix.length)
        assert prefix.length % BLOCK == 0
        assert prefix.length < len(prompt), "the last token is always read"
        if prefix.length:
            restored = prefixes.restore(cache_of(config, [], before=-1.0), prefix)
            wanted = cache_of(config, prompt[: prefix.length], before=-1.0)
            jax.tree.map(np.testing.assert_array_equal, restored, wanted)
        for end in range(prefix.length + BLOCK, len(prompt) + 1, BLOCK):
            prefix = prefixes.add(cache_of(config, prompt[:end], before=-2.0), prefix, prompt[end - BLOCK : end])
            assert prefix.length == end
            stored += prefix.serial is not None
        assert len(prefixes) + len(prefixes._free) == room, "no room is lost"
    assert sum(np.array(hits) >= 2 * BLOCK) > 20
    assert stored > 5 * room
    prefixes.clear()
    assert prefixes.find([0] * CAPACITY) == NO_PREFIX


def test_the_least_recently_used_end_is_removed():
    config = CONFIG.replace(sliding_window=None, layer_pattern=("global",))
    prefixes = PrefixCache(config, 2, 3 * kv_cache_bytes(config, 1, 2))
    cache = init_cache(config, 1, CAPACITY)

    def store(*tokens):
        prefix = prefixes.find([*tokens, 0])
        for end in range(prefix.length + 2, len(tokens) + 1, 2):
            prefix = prefixes.add(cache, prefix, tokens[end - 2 : end])
        return prefix.serial is not None

    def length(*tokens):
        return prefixes.find([*tokens, 0]).length

    assert store(1, 1, 2, 2)
    assert store(3, 3)
    assert length(1, 1, 2, 2) == 4  # used again, so that 3 3 is the oldest
    assert store(4, 4)
    assert (length(3, 3), length(1, 1, 2, 2)) == (0, 4)
    assert length(4, 4) == 2
    assert store(5, 5), "2 2 is removed before 1 1, which it continues"
    assert (length(1, 1, 2, 2), length(4, 4), length(5, 5)) == (2, 2, 2)
    assert store(4, 4, 6, 6)
    assert store(4, 4, 6, 6, 7, 7)
    assert not store(4, 4, 6, 6, 7, 7, 8, 8), "the beginning of what is stored is never removed"
    assert length(4, 4, 6, 6, 7, 7) == 6


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


def counted(monkeypatch):
    """The blocks that were prefilled, as lists of token ids."""
    blocks, prefill = [], infer.engine.prefill

    def count(config, params, tokens, lengths, cache, **options):
        blocks.append(tokens[0, : lengths[0]].tolist())
        return prefill(config, params, tokens, lengths, cache, **options)

    monkeypatch.setattr(infer.engine, "prefill", count)
    return blocks


def test_the_engine_reads_only_what_it_has_not_read(params, monkeypatch):
    engine = Engine(CONFIG, params, slots=3, capacity=64, block=16, chunk=16)
    blocks = counted(monkeypatch)
    system = list(range(16)) * 2

    def serve(*prompts):
        blocks.clear()
        requests = [engine.submit(prompt, ENDLESS, 3) for prompt in prompts]
        engine.run()
        return [request.prefix_hits for request in requests]

    assert serve([*system, 1]) == [0]
    assert blocks == [system[:16], system[16:], [1]]
    assert serve([*system, 2, 3], system) == [32, 16]
    assert blocks == [[2, 3], system[16:]]
    assert engine.totals.prefix_queries == engine.totals.prompt_tokens == 33 + 34 + 32
    assert engine.totals.prefix_hits == 48
    # More equal prompts than slots: each of the later ones waits for a slot, and none is read again.
    assert serve(*[[*system, 5, 6, 7]] * 7) == [32, *[35] * 6]
    assert blocks == [[5, 6, 7]]
    assert engine.totals.finished == {"length": 10}


def test_a_cancelled_prompt_leaves_what_it_read(params, monkeypatch):
    engine = Engine(CONFIG, params, slots=1, capacity=64, block=16, chunk=16)
    prompt = list(range(20, 30)) * 4
    first = engine.submit(prompt, ENDLESS, 3)
    engine.step()
    engine.cancel(first)
    blocks = counted(monkeypatch)
    second = engine.submit(prompt, ENDLESS, 3)
    engine.run()
    assert (second.prefix_hits, len(blocks)) == (16, 2)


def test_the_limit_in_bytes(params):
    slot = kv_cache_bytes(CONFIG, 1, 64)
    default = Engine(CONFIG, params, slots=8, capacity=64, block=16)
    block = kv_cache_bytes(CONFIG, 1, 16)
    assert default._prefixes.rows == 2 * slot // block
    assert Engine(CONFIG, params, slots=2, capacity=64, block=16)._prefixes.rows == slot // block, "at least a slot's"
    off = Engine(CONFIG, params, slots=1, capacity=64, block=16, prefix_bytes=0)
    for _ in range(2):
        request = off.submit([1] * 40, ENDLESS, 2)
        off.submit([2] * 40, ENDLESS, 2)
        off.run()
    assert request.prefix_hits == off.totals.prefix_queries == 0
    with pytest.raises(InputError, match="prefix_bytes=-1"):
        Engine(CONFIG, params, prefix_bytes=-1)

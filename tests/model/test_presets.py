"""Presets of released models have the released parameters: by the published count, and by hand from the shapes."""

import time

import pytest

from model import accounting, presets
from model.layout import layer_kinds

RELEASED = [name for name in presets.names() if presets.lookup(name).released_parameters]
ROUNDED = ("gpt3-175b", "mt-nlg-530b")  # no checkpoint; a paper gives four digits


@pytest.mark.parametrize("name", RELEASED)
def test_the_count_is_the_published_one(name):
    preset = presets.lookup(name)
    ours = accounting.parameters(preset.config).total
    assert preset.source
    assert abs(ours / preset.released_parameters - 1) < 0.005
    if name not in ROUNDED:
        assert ours == preset.released_parameters


def test_our_own_presets_claim_no_release():
    own = [name for name in presets.names() if name not in RELEASED]
    assert all(name in ("tiny", "flash-moe") or name.startswith("study-") for name in own)
    assert not any(presets.lookup(name).source for name in own)


# By hand. Matrices, then vectors; nothing is read from a preset.


def gpt(vocab, context, width, layers, final_norm=2):
    """12 d² and 13 d a layer: 4 d² attention, 8 d² feed-forward; 9 d biases, 4 d of two norms."""
    return (vocab + context) * width + layers * (12 * width**2 + 13 * width) + final_norm * width


def bert(vocab, context, width, layers):
    """GPT's layers; two token types, a norm of the embedding, a pooler."""
    return gpt(vocab, context, width, layers, final_norm=0) + 4 * width + width**2 + width


def t5(vocab, width, inner, d_ff, layers, heads):
    """Encoder layers with one attention and two norms, decoder layers with two and three; two tables of 32 buckets."""
    attention, feed_forward = 4 * width * inner, 2 * width * d_ff
    encoder = attention + feed_forward + 2 * width
    decoder = 2 * attention + feed_forward + 3 * width
    return vocab * width + layers * (encoder + decoder) + 2 * 32 * heads + 2 * width


def llama(vocab, width, layers, heads, kv_heads, head_dim, d_ff, tied=False, norms=2, per_layer=0):
    """Grouped-query attention, three matrices of the feed-forward, `norms` of d a layer, one at the end."""
    attention = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim
    layer = attention + 3 * width * d_ff + norms * width + per_layer
    return (1 if tied else 2) * vocab * width + layers * layer + width


def experts(width, layers, count, top_k, d_ff):
    """(all, what one token passes) of routed experts with a router, instead of no feed-forward."""
    return tuple(layers * (width * count + n * 3 * width * d_ff) for n in (count, top_k))


BY_HAND = {
    "gpt1": gpt(40_478, 512, 768, 12, final_norm=0),
    "bert-base": bert(30_522, 512, 768, 12),
    "bert-large": bert(30_522, 512, 1024, 24),
    "gpt2-small": gpt(50_257, 1024, 768, 12),
    "gpt2-medium": gpt(50_257, 1024, 1024, 24),
    "gpt2-large": gpt(50_257, 1024, 1280, 36),
    "gpt2-xl": gpt(50_257, 1024, 1600, 48),
    "gpt3-175b": gpt(50_257, 2048, 12_288, 96),
    "mt-nlg-530b": gpt(51_200, 2048, 20_480, 105),
    "t5-small": t5(32_128, 512, 512, 2048, 6, 8),
    "t5-base": t5(32_128, 768, 768, 3072, 12, 12),
    "llama2-7b": llama(32_000, 4096, 32, 32, 32, 128, 11_008),
    "llama2-13b": llama(32_000, 5120, 40, 40, 40, 128, 13_824),
    "llama2-70b": llama(32_000, 8192, 80, 64, 8, 128, 28_672),
    "llama3-8b": llama(128_256, 4096, 32, 32, 8, 128, 14_336),
    "llama3-70b": llama(128_256, 8192, 80, 64, 8, 128, 28_672),
    "llama3.2-1b": llama(128_256, 2048, 16, 32, 8, 64, 8192, tied=True),
    "mistral-7b": llama(32_000, 4096, 32, 32, 8, 128, 14_336),
    "mixtral-8x7b": llama(32_000, 4096, 32, 32, 8, 128, 0) + experts(4096, 32, 8, 2, 14_336)[0],
    "smollm2-135m": llama(49_152, 576, 30, 9, 3, 64, 1536, tied=True),
    "smollm2-360m": llama(49_152, 960, 32, 15, 5, 64, 2560, tied=True),
    # biases of queries, keys and values
    "qwen2-0.5b": llama(151_936, 896, 24, 14, 2, 64, 4864, tied=True, per_layer=(14 + 2 * 2) * 64),
    "qwen2-1.5b": llama(151_936, 1536, 28, 12, 2, 128, 8960, tied=True, per_layer=(12 + 2 * 2) * 128),
    # norms of a head's query and key
    "qwen3-0.6b": llama(151_936, 1024, 28, 16, 8, 128, 3072, tied=True, per_layer=2 * 128),
    "qwen3-1.7b": llama(151_936, 2048, 28, 16, 8, 128, 6144, tied=True, per_layer=2 * 128),
    "qwen3-30b-a3b": llama(151_936, 2048, 48, 32, 4, 128, 0, per_layer=2 * 128) + experts(2048, 48, 128, 8, 768)[0],
    "gemma2-2b": llama(256_000, 2304, 26, 8, 4, 256, 9216, tied=True, norms=4),
    "gemma3-270m": llama(262_144, 640, 18, 4, 1, 256, 2048, tied=True, norms=4, per_layer=2 * 256),
    "gemma3-1b": llama(262_144, 1152, 26, 4, 1, 256, 6912, tied=True, norms=4, per_layer=2 * 256),
    "deepseek-v2-lite": (
        2 * 102_400 * 2048
        # queries, the latent vector with its norm and shared rotary key, keys and values from it, output, two norms
        + 27 * (2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048 + 2 * 2048)
        + 3 * 2048 * 10_944  # the first layer
        + 26 * 3 * 2048 * 2 * 1408  # the two shared experts
        + experts(2048, 26, 64, 6, 1408)[0]
        + 2048
    ),
}


def test_every_released_model_is_counted_by_hand():
    assert set(RELEASED) == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_count_is_what_the_shapes_make(name):
    assert accounting.parameters(presets.get(name)).total == BY_HAND[name]


@pytest.mark.parametrize(
    ("name", "shape", "published"),
    [
        ("mixtral-8x7b", (4096, 32, 8, 2, 14_336), 12.9e9),  # Jiang et al. 2024, section 1: 13B active, of 47B
        ("qwen3-30b-a3b", (2048, 48, 128, 8, 768), None),
        ("deepseek-v2-lite", (2048, 26, 64, 6, 1408), None),
    ],
)
def test_active_leaves_out_the_experts_that_a_token_does_not_pass(name, shape, published):
    books = accounting.parameters(presets.get(name))
    every, chosen = experts(*shape)
    assert books.total - books.active == every - chosen
    if published is not None:
        assert abs(books.active / published - 1) < 0.005


@pytest.mark.parametrize("name", [name for name in presets.names() if presets.get(name).experts is None])
def test_all_of_a_dense_model_is_active(name):
    books = accounting.parameters(presets.get(name))
    assert books.active == books.total


def kinds_of(name: str) -> dict[str, int]:
    kinds = [kind.name for kind in layer_kinds(presets.get(name))]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def test_layers_are_of_the_published_kinds():
    assert kinds_of("llama3-8b") == {"dense": 32}
    assert kinds_of("mistral-7b") == {"local_dense": 32}
    assert kinds_of("mixtral-8x7b") == {"experts": 32}
    assert kinds_of("gemma2-2b") == {"local_dense": 13, "dense": 13}
    assert kinds_of("gemma3-1b") == {"local_dense": 22, "dense": 4}
    assert kinds_of("deepseek-v2-lite") == {"dense": 1, "experts": 26}
    # Gemma 3's global layers turn ten times slower than its windows, and are the 6th, 12th, …
    kinds = layer_kinds(presets.get("gemma3-1b"))
    assert [i for i, kind in enumerate(kinds) if kind.window is None] == [5, 11, 17, 23]
    assert {(kind.window, kind.rope_base) for kind in kinds} == {(512, 1e4), (None, 1e6)}


def test_a_million_tokens_cost_flash_moe_the_cache_of_its_global_layers():
    config = presets.get("flash-moe")
    assert config.vocab_size >= 256_000
    assert config.max_seq_len >= 1_000_000
    per_layer = 2 * config.num_kv_heads * config.head_dim * 2  # bytes of a token in bfloat16
    windows, globals_ = (sum((k.window is not None) == local for k in layer_kinds(config)) for local in (True, False))
    whole = per_layer * (windows * config.sliding_window + globals_ * config.max_seq_len)
    assert accounting.kv_cache_bytes(config, 1, config.max_seq_len, "bfloat16") == whole
    books = accounting.parameters(config)
    assert books.active < books.total / 5


def test_an_unknown_preset_lists_the_close_ones():
    with pytest.raises(KeyError, match="llama2-70b"):
        presets.get("llama-2-70b")
    with pytest.raises(KeyError, match="mixtral-8x7b"):
        presets.lookup("mixtral-7b")


def test_gpt2_small_has_the_published_count():
    """124,439,808: the parameters of OpenAI's 124M model and of Hugging Face's `openai-community/gpt2`."""
    books = accounting.parameters(presets.get("gpt2-small"))
    assert books.total == 124_439_808
    assert books.embedding == (50_257 + 1024) * 768
    assert books.non_embedding == books.active - books.embedding == 85_056_000


def test_latent_attention_caches_the_published_size():
    """DeepSeek-V2, section 2.1.4: kv_rank + rope_dim elements per token and layer, for V2-Lite 512 + 64."""
    assert accounting.kv_cache_bytes(presets.get("deepseek-v2-lite"), 1, 1000, "bfloat16") == 27 * 1000 * 576 * 2


def test_a_model_of_530_billion_is_booked_at_once():
    config = presets.get("mt-nlg-530b")
    accounting.parameters.cache_clear()
    start = time.perf_counter()
    accounting.parameters(config)
    training = accounting.flops_per_token(config, 2048, "exact")
    cache = accounting.kv_cache_bytes(config, 8, 2048, "bfloat16")
    seconds = time.perf_counter() - start
    assert seconds < 2
    # Narayanan et al. 2021, section 3, without recomputation: 72 s l h² (1 + s/6h + V/12lh) per sequence of s.
    layers, width, seq = 105, 20_480, 2048
    expected = 72 * layers * width**2 * (1 + seq / (6 * width) + 51_200 / (12 * layers * width))
    assert training == pytest.approx(expected, rel=1e-12)
    assert cache == 2 * layers * 8 * seq * width * 2

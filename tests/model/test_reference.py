"""Our logits are those of the papers: an implementation in NumPy and float64, written from them and not from ours.

Vaswani et al. 2017 (attention, sinusoids), Ba et al. 2016 (LayerNorm), Zhang and Sennrich 2019 (RMSNorm), Su et al.
2021 (rotary), Shazeer 2019 and 2020 (MQA, SwiGLU), Ainslie et al. 2023 (GQA), Radford et al. 2019 (pre-norm, GPT-2).
"""

import math

import jax
import numpy as np
import pytest

from model import ModelConfig, apply
from model.feedforward import ACTIVATIONS

BATCH, SEQ = 2, 11

GPT2 = ModelConfig(
    vocab_size=48,
    d_model=24,
    num_layers=2,
    num_heads=3,
    max_seq_len=16,
    position="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated=False,
    use_bias=True,
    tie_embeddings=True,
)
LLAMA = ModelConfig(
    vocab_size=48,
    d_model=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=40,
    max_seq_len=16,
    position="rotary",
    rope_base=100.0,
    norm="rmsnorm",
    norm_epsilon=1e-2,
    activation="silu",
    gated=True,
    tie_embeddings=False,
)
SINUSOIDAL = ModelConfig(
    vocab_size=48,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    max_seq_len=16,
    position="sinusoidal",
    norm="layernorm",
    activation="relu",
    gated=False,
    use_bias=False,
    tie_embeddings=False,
)


def layer_norm(x, p, epsilon):
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index]
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        out[index] = (row - mean) / math.sqrt(variance + epsilon)
    return out * p["scale"] + p.get("bias", 0.0)


def rms_norm(x, p, epsilon):
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        out[index] = x[index] / math.sqrt(sum(v * v for v in x[index]) / x.shape[-1] + epsilon)
    return out * p["scale"]


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm}
SCALAR_ACTIVATIONS = {
    "relu": lambda v: max(v, 0.0),
    "relu_squared": lambda v: max(v, 0.0) ** 2,
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + math.exp(-v)),
}


def linear(x, p):
    return np.einsum("...i,io->...o", x, p["weight"]) + p.get("bias", 0.0)


def rotate(vector, position, base):
    """Each pair (i, i + half) as a complex number, turned by position · base^(−2i/d)."""
    half = len(vector) // 2
    turned = [
        complex(vector[i], vector[i + half]) * np.exp(1j * position * base ** (-2 * i / len(vector)))
        for i in range(half)
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def attention(config, x, p):
    """One row [seq, d_model], query by query and head by head."""
    seq, dim = x.shape[0], config.head_dim
    query = linear(x, p["query"]).reshape(seq, config.num_heads, dim)
    key = linear(x, p["key"]).reshape(seq, config.num_kv_heads, dim)
    value = linear(x, p["value"]).reshape(seq, config.num_kv_heads, dim)
    if config.position == "rotary":
        for heads in (query, key):
            for t in range(seq):
                for h in range(heads.shape[1]):
                    heads[t, h] = rotate(heads[t, h], t, config.rope_base)
    mixed = np.zeros((seq, config.num_heads, dim))
    for h in range(config.num_heads):
        shared = h // (config.num_heads // config.num_kv_heads)
        for t in range(seq):
            scores = [query[t, h] @ key[s, shared] / math.sqrt(dim) for s in range(t + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for s in range(t + 1):
                mixed[t, h] += weights[s] / sum(weights) * value[s, shared]
    return linear(mixed.reshape(seq, -1), p["output"])


def feed_forward(config, x, p):
    activation = np.vectorize(SCALAR_ACTIVATIONS[config.activation])
    if config.gated:
        return linear(activation(linear(x, p["gate"])) * linear(x, p["up"]), p["down"])
    return linear(activation(linear(x, p["up"])), p["down"])


def sinusoid(position, width):
    angles = [position / 10_000 ** (2 * i / width) for i in range(width // 2)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def reference(config, params, tokens):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    norm = lambda x, p: NORMS[config.norm](x, p, config.norm_epsilon)
    rows = []
    for row in tokens:
        x = np.stack([params["embedding"]["tokens"][token] for token in row])
        for t in range(len(row)):
            if config.position == "learned":
                x[t] += params["embedding"]["positions"][t]
            if config.position == "sinusoidal":
                x[t] += sinusoid(t, config.d_model)
        for index in range(config.num_layers):
            p = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"]["dense"])
            x = x + attention(config, norm(x, p["attention_norm"]), p["attention"])
            x = x + feed_forward(config, norm(x, p["feed_forward_norm"]), p["feed_forward"])
        x = norm(x, params["final_norm"])
        table = params["embedding"]["tokens"].T if config.tie_embeddings else params["head"]["weight"]
        rows.append(x @ table)
    return np.stack(rows)


@pytest.mark.parametrize("config", [GPT2, LLAMA, SINUSOIDAL], ids=["gpt2", "llama", "sinusoidal"])
def test_logits_agree_with_the_papers(config, random_params):
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, SEQ))
    expected = reference(config, params, tokens)
    logits = np.asarray(jax.jit(apply, static_argnums=0)(config, params, tokens), np.float64)
    assert np.abs(logits - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_agree_with_their_formulas(name):
    x = np.linspace(-6, 6, 201)
    expected = np.vectorize(SCALAR_ACTIVATIONS[name])(x)
    np.testing.assert_allclose(ACTIVATIONS[name](x.astype(np.float32)), expected, atol=2e-6)

"""The one set of books: parameters, FLOPs and bytes. No array is made.

A multiply and an add are two FLOPs. Every number says its convention. "Per token" of an encoder-decoder means one
target token together with one source token: both sides are rows of the same length.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from model import transformer
from model.config import ModelConfig
from model.errors import InputError
from model.layout import LayerKind, layer_kinds

Convention = Literal["exact", "6N"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts. A tied table counts once.

    embedding: the tables of tokens, positions and token types. non_embedding: the rest, an untied head included.
    active: what one token passes through: top_k of the routed experts, all of everything else, whole tables.
    by_group: the same total by part, over all layers; "encoder/…" is the encoder of an encoder-decoder.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int
    by_group: dict[str, int]


@functools.lru_cache(maxsize=4096)
def parameters(config: ModelConfig) -> Parameters:
    """Count from the shapes that `init` would make."""
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    groups: collections.Counter[str] = collections.Counter()
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        size, group = math.prod(leaf.shape), _group([entry.key for entry in path])
        groups[group] += size
        total += size
        if config.experts is not None and group == "layers/experts":
            size = size // config.experts.count * config.experts.top_k
        active += size
    if total != sum(groups.values()):
        raise AssertionError("the groups do not add up to the total")
    embedding = sum(groups[f"embedding/{table}"] for table in ("tokens", "positions", "types"))
    return Parameters(total, embedding, total - embedding, active, by_group={k: n for k, n in groups.items() if n})


def _group(path: Sequence[str]) -> str:
    """The part that a parameter belongs to; `model.transformer` says what the paths are."""
    if path[0] == "encoder":
        return f"encoder/{_group(path[1:])}"
    if path[0] == "embedding":
        return f"embedding/{path[1]}"
    if path[0] != "layers":
        return path[0]
    part = path[2]  # after the kind of layer
    if part == "feed_forward" and path[3] in ("experts", "router", "shared", "shared_gate"):
        part = {"shared": "shared expert", "shared_gate": "shared expert"}.get(path[3], path[3])
    return f"layers/{'norms' if part.endswith('_norm') else part}"


def flops_per_token(
    config: ModelConfig, seq_len: int, convention: Convention = "exact", training: bool = True
) -> float:
    """FLOPs of one token in a row of `seq_len`.

    "6N": 6 per active parameter in training, 2 in a forward pass; the embedding table counts once
    (Kaplan et al. 2020, section 2.1, with embeddings). "exact": every product of `forward_flops_by_product`,
    times 3 in training (gradients by input and by weight); no softmax, norms or optimizer.
    """
    if convention == "6N":
        return (6 if training else 2) * parameters(config).active
    if convention != "exact":
        raise InputError(f"convention={convention!r} must be 'exact' or '6N'")
    forward = sum(forward_flops_by_product(config, seq_len).values())
    return (3 if training else 1) * forward


def forward_flops_by_product(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Exact forward FLOPs per token in a row of `seq_len`, by product, over all layers.

    As `model.forward` computes them over whole rows: attention is dense, S × S, where a mask or a window hides keys
    too. Latent attention makes every head's keys and values. Of the routed experts a token's top_k count, without the
    padding of their batches. A classifier's head sees one token of the row.
    """
    flops: collections.Counter[str] = collections.Counter()
    for kind in layer_kinds(config):
        flops.update(_layer_flops(config, kind, seq_len))
    if config.stack == "encoder-decoder":
        for kind in layer_kinds(config, encoder=True):
            flops.update({f"encoder {name}": count for name, count in _layer_flops(config, kind, seq_len).items()})
    return dict(flops) | _head_flops(config, seq_len)


def _layer_flops(config: ModelConfig, kind: LayerKind, seq_len: int) -> dict[str, float]:
    """Per token in one layer."""
    width, heads, latent = config.d_model, config.num_heads, config.latent
    query_width, kv_width = heads * config.head_dim, config.num_kv_heads * config.head_dim
    if latent is None:
        projections, value_width = width * (2 * query_width + 2 * kv_width), query_width
    else:
        rank, value_width = latent.q_rank, heads * latent.v_dim
        projections = width * query_width if rank is None else rank * (width + query_width)
        projections += width * (latent.kv_rank + latent.rope_dim)
        projections += latent.kv_rank * (heads * latent.nope_dim + value_width) + value_width * width
    flops: dict[str, float] = {
        "attention projections": 2 * projections,
        "attention scores": 2 * seq_len * query_width,
        "attention mix": 2 * seq_len * value_width,
    }
    if kind.cross:
        flops |= {
            "cross-attention projections": 2 * width * (2 * query_width + 2 * kv_width),
            "cross-attention scores": 2 * seq_len * query_width,
            "cross-attention mix": 2 * seq_len * query_width,
        }
    matrices = 3 if config.gated else 2
    if kind.experts:
        experts = config.experts
        assert experts is not None
        flops["router"] = 2 * width * experts.count
        flops["experts"] = 2 * width * experts.top_k * experts.d_ff * matrices
        if experts.shared_d_ff:
            flops["shared expert"] = 2 * width * (experts.shared_d_ff * matrices + experts.shared_gate)
    else:
        flops["feed-forward"] = 2 * width * config.d_ff * matrices
    return flops


def _head_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    width = config.d_model
    if config.head == "none":
        return {}
    if config.head == "scalar":
        return {"head": 2 * width}
    if config.head == "classifier":
        pooler = width * width if config.pooler else 0
        return {"head": 2 * (pooler + width * config.num_labels) / seq_len}
    transform = 2 * width * width if config.head == "masked-language-model" else 0
    return {"head": transform + 2 * width * config.vocab_size}


def kv_cache_bytes(
    config: ModelConfig, batch: int, length: int, dtype: str | None = None, encoder_length: int | None = None
) -> int:
    """Bytes of keys and values for `length` tokens in each of `batch` rows; give the filled or the allocated length.

    A window's layer holds no more than its window; latent attention holds kv_rank + rope_dim features a token. An
    encoder-decoder holds `encoder_length` source tokens (None: `length`) too, an encoder nothing. dtype None: the
    compute dtype.
    """
    if config.stack == "encoder":
        return 0
    features = 2 * config.num_kv_heads * config.head_dim
    if config.latent is not None:
        features = config.latent.kv_rank + config.latent.rope_dim
    tokens = sum(length if kind.window is None else min(length, kind.window) for kind in layer_kinds(config))
    if config.stack == "encoder-decoder":
        tokens += config.num_layers * (length if encoder_length is None else encoder_length)
    return batch * tokens * features * jnp.dtype(dtype or config.compute_dtype).itemsize


def parameter_bytes(config: ModelConfig, dtype: str = "float32") -> int:
    """Bytes of all parameters in one precision."""
    return parameters(config).total * jnp.dtype(dtype).itemsize


def training_bytes(config: ModelConfig) -> dict[str, int]:
    """What training holds per parameter, all in float32: 16 bytes. Activations come on top and are not estimated."""
    size = parameter_bytes(config, "float32")
    return {"parameters": size, "gradients": size, "Adam moments": 2 * size}


def serving_bytes(config: ModelConfig, batch: int, length: int, dtype: str = "bfloat16") -> dict[str, int]:
    """What serving holds when `batch` rows are `length` tokens long, weights and cache in one precision."""
    return {
        "weights": parameter_bytes(config, dtype),
        "cache": kv_cache_bytes(config, batch, length, dtype),
    }


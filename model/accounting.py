"""The one set of books: parameters, FLOPs and bytes. No array is made.

A multiply and an add are two FLOPs. Every number says its convention.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from model import transformer
from model.config import ModelConfig
from model.errors import InputError

Convention = Literal["exact", "6N"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts. A tied table counts once.

    embedding: token and position tables. non_embedding: the rest, an untied head included.
    active: what one token passes through. by_group: the same total, per top-level part.
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
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    groups = {name: count(tree) for name, tree in shapes.items() if name != "layers"}
    groups |= {f"layers/{name}": count(tree) for name, tree in shapes["layers"].items()}
    total, embedding = count(shapes), groups["embedding"]
    if total != sum(groups.values()):
        raise AssertionError("the groups do not add up to the total")
    return Parameters(total, embedding, total - embedding, active=total, by_group=groups)


def flops_per_token(
    config: ModelConfig, seq_len: int, convention: Convention = "exact", training: bool = True
) -> float:
    """FLOPs of one token in a row of `seq_len`.

    "6N": 6 per active parameter in training, 2 in a forward pass; the embedding table counts once
    (Kaplan et al. 2020, section 2.1, with embeddings). "exact": every product including dense S × S attention,
    times 3 in training (gradients by input and by weight); no softmax, norms or optimizer.
    """
    if convention == "6N":
        return (6 if training else 2) * parameters(config).active
    if convention != "exact":
        raise InputError(f"convention={convention!r} must be 'exact' or '6N'")
    forward = sum(forward_flops_by_product(config, seq_len).values())
    return (3 if training else 1) * forward


def forward_flops_by_product(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Exact forward FLOPs per token, by product, over all layers."""
    width, layers = config.d_model, config.num_layers
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attention projections": layers * 2 * width * (2 * query_width + 2 * kv_width),
        "attention scores": layers * 2 * seq_len * query_width,
        "attention mix": layers * 2 * seq_len * query_width,
        "feed-forward": layers * 2 * width * config.d_ff * (3 if config.gated else 2),
        "head": 2 * width * config.vocab_size,
    }


def kv_cache_bytes(config: ModelConfig, batch: int, length: int, dtype: str | None = None) -> int:
    """Bytes of keys and values for `length` tokens in each of `batch` rows; give the filled or the allocated length."""
    itemsize = jnp.dtype(dtype or config.compute_dtype).itemsize
    return 2 * config.num_layers * batch * length * config.num_kv_heads * config.head_dim * itemsize


def parameter_bytes(config: ModelConfig, dtype: str = "float32") -> int:
    """Bytes of all parameters in one precision."""
    return parameters(config).total * jnp.dtype(dtype).itemsize

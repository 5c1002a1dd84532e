"""Accounting of parameters, FLOPs and bytes, from the config alone: no array is made and nothing is traced.

A multiply and an add are two FLOPs. Every function states its convention. "Per token" means, for an encoder-decoder,
one target token together with one source token: both are rows of the same length.
"""

import collections
import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp

from model import matrices
from model.config import ModelConfig
from model.dtypes import DTypeLike, dtype_name
from model.errors import InputError
from model.layout import layer_kinds
from model.products import ALL, Trained, flops_by_product
from model.stack import Params

Convention = Literal["exact", "6N"]
_STORED = ("float32", "bfloat16", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. A tied table counts once.

    embedding: the tables of tokens, positions and token types. non_embedding: the rest, an untied head included.
    active: the parameters that one token uses: top_k of the routed experts, all others in full, tables included.
    by_group: the total by part, over all layers; "encoder/…" is the encoder of an encoder-decoder.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int
    by_group: dict[str, int]


@functools.lru_cache(maxsize=4096)
def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters that `model.init` returns."""
    groups: collections.Counter[str] = collections.Counter()
    tables = matrices.embedding_tables(config)
    groups.update({f"embedding/{name}": count for name, count in tables.items()})
    if config.embedding_norm:
        groups["embedding/norm"] = matrices.norm_size(config)
    if config.stack == "encoder-decoder":
        encoder, _ = _stack_parameters(config, encoder=True)
        groups.update({f"encoder/{name}": count for name, count in encoder.items()})
    stack, idle = _stack_parameters(config, encoder=False)
    groups.update(stack)
    for matrix in matrices.head_matrices(config):
        groups[matrix.part] += matrix.stored * matrix.size
    groups["head"] += matrices.head_vectors(config)
    total, embedding = sum(groups.values()), sum(tables.values())
    by_group = {name: count for name, count in groups.items() if count}
    return Parameters(total, embedding, total - embedding, total - idle, by_group)


def _stack_parameters(config: ModelConfig, encoder: bool) -> tuple[dict[str, int], int]:
    """Return the parameters of one stack by group, and the number in experts that a token does not use."""
    groups: collections.Counter[str] = collections.Counter()
    idle = 0
    if config.position == "relative":
        groups["relative_bias"] = config.relative_buckets * config.num_heads
    for kind, count in collections.Counter(layer_kinds(config, encoder)).items():
        for matrix in matrices.layer_matrices(config, kind):
            groups[f"layers/{matrix.part}"] += count * matrix.stored * matrix.size
            idle += count * (matrix.stored - matrix.used) * matrix.size
        for part, size in matrices.layer_vectors(config, kind).items():
            groups[f"layers/{part}"] += count * size
    if config.final_norm:
        groups["final_norm"] = matrices.norm_size(config)
    return groups, idle


def flops_per_token(
    config: ModelConfig,
    seq_len: int,
    convention: Convention = "exact",
    training: bool = True,
    source_len: int | None = None,
    trained: Trained = ALL,
) -> float:
    """Return the FLOPs of one token in a row of `seq_len` tokens.

    "6N": 6 per active parameter in training, 2 in a forward pass; the embedding table counts once (Kaplan et al. 2020,
    section 2.1, with embeddings). All parameters count, trained or frozen. "exact": all matrix products of the forward
    pass (`forward_flops_by_product`), and in training also of the backward pass (`training_flops_by_product`), twice as
    many if all parameters are trained. Neither counts softmax, norms, recomputation or the optimizer.

    source_len: the number of tokens that an encoder-decoder's encoder reads for the row; None: seq_len. trained:
    default: all parameters. Raises InputError for another convention.
    """
    if convention == "6N":
        return (6 if training else 2) * parameters(config).active
    if convention != "exact":
        raise InputError(f"convention={convention!r} must be 'exact' or '6N'")
    if training:
        return sum(training_flops_by_product(config, seq_len, source_len, trained).values())
    return sum(forward_flops_by_product(config, seq_len, source_len).values())


def forward_flops_by_product(config: ModelConfig, seq_len: int, source_len: int | None = None) -> dict[str, float]:
    """Return the exact forward FLOPs per token in a row of `seq_len` tokens, by product, over all layers.

    Products are those of `model.forward` over whole rows: attention is dense, seq_len × seq_len, also where a mask or a
    window hides keys. Latent attention computes keys and values of every head. Of the routed experts, the top_k of a
    token count, without the padding of their blocks. A classifier's head reads one token of the row.

    source_len: the number of tokens that an encoder-decoder's encoder reads for the row (None: seq_len); the encoder's
    products are also divided by the tokens of the row.
    """
    return dict(flops_by_product(config, seq_len, source_len).forward)


def training_flops_by_product(
    config: ModelConfig, seq_len: int, source_len: int | None = None, trained: Trained = ALL
) -> dict[str, float]:
    """Return the exact FLOPs of training per token in a row of `seq_len` tokens, by product, forward and backward.

    A matrix counts 3 times its forward product where both the matrix and a parameter below it are trained, 2 times if
    one of the two is, and once if neither is. Low-rank factors (rank and targets of `trained`) are a product of their
    own, "adapters", with the rank that they are stored with.
    """
    forward, backward = flops_by_product(config, seq_len, source_len, trained)
    return {name: flops + backward[name] for name, flops in forward.items()}


def kv_cache_bytes(
    config: ModelConfig, batch: int, length: int, dtype: DTypeLike | None = None, encoder_length: int | None = None
) -> int:
    """Return the bytes of keys and values for `length` tokens, filled or allocated, in each of `batch` rows.

    A layer with a window holds at most its window; latent attention holds kv_rank + rope_dim features per token. An
    encoder-decoder also holds `encoder_length` source tokens (None: `length`), an encoder holds nothing. dtype None:
    the compute dtype; int8: with a float32 scale for every head's key and value, or for each part of a latent vector.
    """
    if config.stack == "encoder":
        return 0
    dtype = dtype_name(config.compute_dtype if dtype is None else dtype, _STORED, "cache dtype")
    features, scales = 2 * config.num_kv_heads * config.head_dim, 2 * config.num_kv_heads
    if config.latent is not None:
        features, scales = config.latent.kv_rank + config.latent.rope_dim, 2
    tokens = sum(length if kind.window is None else min(length, kind.window) for kind in layer_kinds(config))
    if config.stack == "encoder-decoder":
        tokens += config.num_layers * (length if encoder_length is None else encoder_length)
    return batch * tokens * (features * jnp.dtype(dtype).itemsize + (4 * scales if dtype == "int8" else 0))


def decode_step_flops(config: ModelConfig, batch: int, length: int) -> int:
    """Return the exact FLOPs of decoding one token in each of `batch` rows of `length` tokens, the new one included.

    Matrix products only, as in `flops_per_token`. Attention reads the filled part of the cache, in a layer with a
    window at most the window. In latent attention the up-projection is absorbed: heads attend to the latent vectors.
    """
    flops = sum(matrix.flops for matrix in matrices.head_matrices(config))
    query, value = config.head_dim, config.head_dim
    if config.latent is not None:
        query, value = config.latent.kv_rank + config.latent.rope_dim, config.latent.kv_rank
    for kind in layer_kinds(config):
        num_keys = length if kind.window is None else min(length, kind.window)
        flops += sum(matrix.flops for matrix in matrices.layer_matrices(config, kind))
        flops += 2 * num_keys * config.num_heads * (query + value)
    return batch * flops


def decode_step_bytes(
    config: ModelConfig, params: Params, batch: int, length: int, cache_dtype: DTypeLike | None = None
) -> dict[str, float]:
    """Return the bytes that decoding one token in each of `batch` rows must read: {"weights", "embedding", "cache"}.

    params: arrays or their shapes; prepared ones count as they are stored. weights: every leaf once, but of the routed
    experts only the number expected to be chosen by `batch` tokens under uniform routing, count · (1 − (1 − top_k /
    count)^batch): 8 experts with top_k = 2 and 4 tokens are 8 · (1 − 0.75⁴) = 5.5. embedding: the rows looked up; a
    token table that is also the head counts in full under weights. cache: `kv_cache_bytes` of `length` tokens per row.
    """
    read = {"weights": 0.0, "embedding": 0.0, "cache": float(kv_cache_bytes(config, batch, length, cache_dtype))}
    experts, tied = config.experts, "weight" not in params.get("head", {})
    share = 1.0 if experts is None else 1 - (1 - experts.top_k / experts.count) ** batch
    for path, leaf in jax.tree_util.tree_leaves_with_path({name: params[name] for name in params if name != "encoder"}):
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        size = leaf.size * jnp.dtype(leaf.dtype).itemsize
        if names[0] == "embedding" and names[1] in ("tokens", "positions", "types"):
            read["embedding"] += batch * size / leaf.shape[0]
            read["weights"] += size if names[1] == "tokens" and tied else 0
        else:
            routed = ("feed_forward", "experts") in itertools.pairwise(names)  # "experts" is also a kind of layers
            read["weights"] += size * (share if routed else 1)
    return read


def parameter_bytes(config: ModelConfig, dtype: DTypeLike = "float32") -> int:
    """Return the bytes of all parameters in one precision; int8: without scales."""
    return parameters(config).total * jnp.dtype(dtype_name(dtype, _STORED)).itemsize


def training_bytes(config: ModelConfig, trained: int | None = None, frozen: int = 0) -> dict[str, int]:
    """Return the bytes of the training state in float32, 16 per trained parameter, without activations.

    trained: bytes of the trained parameters; None: all. frozen: bytes of the others, without gradients and moments.
    """
    size = parameter_bytes(config, "float32") if trained is None else trained
    held = {"parameters": size, "gradients": size, "Adam moments": 2 * size}
    return held | ({"frozen parameters": frozen} if frozen else {})


def serving_bytes(config: ModelConfig, batch: int, length: int, dtype: DTypeLike = "bfloat16") -> dict[str, int]:
    """Return the bytes of weights and of the cache of `batch` rows of `length` tokens, in one precision."""
    return {
        "weights": parameter_bytes(config, dtype),
        "cache": kv_cache_bytes(config, batch, length, dtype),
    }

"""The one set of books: parameters, FLOPs and bytes. No array is made and nothing is traced.

A multiply and an add are two FLOPs. Every number says its convention. "Per token" of an encoder-decoder means one
target token together with one source token: both sides are rows of the same length.
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
    """Count what `model.init` would make."""
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
    """Of one stack by group, and how many of them stand in experts that a token does not pass."""
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
    """FLOPs of one token in a row of `seq_len`, of an encoder-decoder's decoder where the encoder reads `source_len`.

    source_len None: as many as the row has. trained: what training changes; default: all parameters.

    "6N": 6 per active parameter in training, 2 in a forward pass; the embedding table counts once
    (Kaplan et al. 2020, section 2.1, with embeddings). It counts all parameters, whichever are trained. "exact": every
    product of `forward_flops_by_product`, and in training those of the gradients, `training_flops_by_product`: twice as
    many again where all is trained. No softmax, norms, recomputation or optimizer.
    """
    if convention == "6N":
        return (6 if training else 2) * parameters(config).active
    if convention != "exact":
        raise InputError(f"convention={convention!r} must be 'exact' or '6N'")
    if training:
        return sum(training_flops_by_product(config, seq_len, source_len, trained).values())
    return sum(forward_flops_by_product(config, seq_len, source_len).values())


def forward_flops_by_product(config: ModelConfig, seq_len: int, source_len: int | None = None) -> dict[str, float]:
    """Exact forward FLOPs per token in a row of `seq_len`, by product, over all layers.

    source_len: tokens that an encoder-decoder's encoder reads for the row (None: seq_len), whose products are counted
    per token of the row too.
    As `model.forward` computes them over whole rows: attention is dense, S × S, where a mask or a window hides keys
    too. Latent attention makes every head's keys and values. Of the routed experts a token's top_k count, without the
    padding of their batches. A classifier's head sees one token of the row.
    """
    return dict(flops_by_product(config, seq_len, source_len).forward)


def training_flops_by_product(
    config: ModelConfig, seq_len: int, source_len: int | None = None, trained: Trained = ALL
) -> dict[str, float]:
    """Exact FLOPs of training per token in a row of `seq_len`, by product, forward and backward.

    A matrix counts 3 times its forward product where it is trained and something below it too, 2 times where one of
    both is, and once where neither is. Low-rank factors (rank and targets of `trained`) are products of their own,
    "adapters", of as many columns as they are stored with.
    """
    forward, backward = flops_by_product(config, seq_len, source_len, trained)
    return {name: once + backward[name] for name, once in forward.items()}


def kv_cache_bytes(
    config: ModelConfig, batch: int, length: int, dtype: DTypeLike | None = None, encoder_length: int | None = None
) -> int:
    """Bytes of keys and values for `length` tokens in each of `batch` rows; give the filled or the allocated length.

    A window's layer holds no more than its window; latent attention holds kv_rank + rope_dim features a token. An
    encoder-decoder holds `encoder_length` source tokens (None: `length`) too, an encoder nothing. dtype None: the
    compute dtype; int8: with the float32 scale of every head's key and value, or of a latent vector's two parts.
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
    """Exact FLOPs of decoding one token in each of `batch` rows that then hold `length` tokens, the new one included.

    Every product, as `flops_per_token` counts them: attention over the filled cache alone, of a window's layer over no
    more than its window. Latent attention is absorbed: every head attends to the latent vectors themselves.
    """
    flops = sum(matrix.flops for matrix in matrices.head_matrices(config))
    query, value = config.head_dim, config.head_dim
    if config.latent is not None:
        query, value = config.latent.kv_rank + config.latent.rope_dim, config.latent.kv_rank
    for kind in layer_kinds(config):
        seen = length if kind.window is None else min(length, kind.window)
        flops += sum(matrix.flops for matrix in matrices.layer_matrices(config, kind))
        flops += 2 * seen * config.num_heads * (query + value)
    return batch * flops


def decode_step_bytes(
    config: ModelConfig, params: Params, batch: int, length: int, cache_dtype: DTypeLike | None = None
) -> dict[str, float]:
    """Bytes that decoding one token in each of `batch` rows must read: {"weights", "embedding", "cache"}.

    params: arrays or their shapes; prepared ones count as they are stored. weights: every leaf once, but of the routed
    experts only as many as `batch` tokens are expected to choose if all are alike: count · (1 − (1 − top_k / count) ^
    batch). embedding: the rows looked up; a token table that serves as the head stands under weights, whole. cache:
    `kv_cache_bytes` of `length` tokens a row, as filled.
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
            routed = ("feed_forward", "experts") in itertools.pairwise(names)  # a stack of layers has that name too
            read["weights"] += size * (share if routed else 1)
    return read


def parameter_bytes(config: ModelConfig, dtype: DTypeLike = "float32") -> int:
    """Bytes of all parameters in one precision; int8: without scales."""
    return parameters(config).total * jnp.dtype(dtype_name(dtype, _STORED)).itemsize


def training_bytes(config: ModelConfig, trained: int | None = None, frozen: int = 0) -> dict[str, int]:
    """What training holds per parameter, all in float32: 16 bytes. Activations come on top and are not estimated.

    trained, frozen: bytes of the parameters that are trained (None: all) and of those that are not, which have neither
    gradients nor moments.
    """
    size = parameter_bytes(config, "float32") if trained is None else trained
    held = {"parameters": size, "gradients": size, "Adam moments": 2 * size}
    return held | ({"frozen parameters": frozen} if frozen else {})


def serving_bytes(config: ModelConfig, batch: int, length: int, dtype: DTypeLike = "bfloat16") -> dict[str, int]:
    """What serving holds when `batch` rows are `length` tokens long, weights and cache in one precision."""
    return {
        "weights": parameter_bytes(config, dtype),
        "cache": kv_cache_bytes(config, batch, length, dtype),
    }

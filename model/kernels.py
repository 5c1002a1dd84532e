"""Which program computes attention: plain XLA, cuDNN's fused kernel, or a Pallas kernel of JAX's own.

The fused ones never write the scores to memory. They know causal masks, windows and segments, but no bias, softcap,
sinks or dropout, nor do they hand out weights: there, and with a cache, it is XLA. "auto" takes cuDNN on GPUs in
bfloat16, Pallas on a single TPU, XLA else. Pallas runs on a CPU too, interpreted: for tests.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.context import Context
from model.errors import InputError

_BLOCK = 128  # rows of queries and keys that Pallas' kernels take at once; they must divide the sequence


def choose_kernel(config: ModelConfig, context: Context, query: Array, plain: bool) -> str:
    """The kernel for this attention. plain: nothing is asked for that only XLA can give.

    Raises InputError where the config names a kernel that this device or shape does not take.
    """
    wanted, backend = config.attention_kernel, jax.default_backend()
    if wanted == "xla" or not plain:
        return "xla"
    seq, head_dim = query.shape[2:]
    many = jax.sharding.get_abstract_mesh().size > 1
    obstacles = {
        "cudnn": [
            (backend != "gpu", f"it needs a GPU, not {backend}"),
            (query.dtype != jnp.bfloat16, f"it needs compute_dtype='bfloat16', not {query.dtype}"),
            (head_dim % 8 != 0 or head_dim > 128, f"it takes heads of a multiple of 8 up to 128, not {head_dim}"),
        ],
        "pallas": [
            (many, "it does not run on a mesh of several devices"),
            (context.window is not None, "it knows no sliding window"),
            (seq % min(_BLOCK, seq) != 0, f"it takes sequences of a multiple of {_BLOCK}, not {seq}"),
            (not context.causal, "it is causal"),
        ],
    }
    if wanted == "auto":
        favourite = {"gpu": "cudnn", "tpu": "pallas"}.get(backend)
        return favourite if favourite and not any(bad for bad, _ in obstacles[favourite]) else "xla"
    for bad, why in obstacles[wanted]:
        if bad:
            raise InputError(f"attention_kernel={wanted!r} cannot be used here: {why}; take 'auto' or 'xla'")
    return wanted


def attend_fused(
    kernel: str,
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    value: Float[Array, "batch kv_heads seq head_dim"],
    context: Context,
    scale: float,
) -> Float[Array, "batch heads seq head_dim"]:
    """Scaled dot-product attention as `model.attention.attend`, by a fused kernel; padding gives anything finite."""
    if kernel == "cudnn":
        mixed = jax.nn.dot_product_attention(
            query.swapaxes(1, 2),
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            mask=None if context.segment_ids is None else context.mask[:, None],
            scale=scale,
            is_causal=context.causal and context.segment_ids is None,
            local_window_size=None if context.window is None else (context.window - 1, 0),
            implementation="cudnn",
        )
        return mixed.swapaxes(1, 2)
    repeats = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    return (
        _pallas_tpu(query, key, value, context, scale)
        if jax.default_backend() == "tpu"
        else _pallas(query, key, value, context, scale)
    )


def _pallas(query: Array, key: Array, value: Array, context: Context, scale: float) -> Array:
    from jax.experimental.pallas.ops.gpu import attention

    block = min(_BLOCK, query.shape[2])
    small = min(32, block)
    sizes = attention.BlockSizes(
        block_q=block, block_k=block, block_q_dkv=small, block_kv_dkv=small, block_q_dq=small, block_kv_dq=small
    )
    mixed = attention.mha(
        *(x.swapaxes(1, 2) for x in (query, key, value)),
        segment_ids=context.segment_ids,
        sm_scale=scale,
        causal=context.causal,
        block_sizes=sizes,
        interpret=jax.default_backend() == "cpu",
    )
    return mixed.swapaxes(1, 2)


def _pallas_tpu(query: Array, key: Array, value: Array, context: Context, scale: float) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention

    ids = context.segment_ids
    segments = None if ids is None else flash_attention.SegmentIds(q=ids, kv=ids)
    return flash_attention.flash_attention(
        query, key, value, segment_ids=segments, causal=context.causal, sm_scale=scale
    )

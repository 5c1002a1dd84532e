"""The kernel that computes attention: plain XLA, cuDNN's fused kernel, or one of JAX's Pallas kernels.

Fused kernels never write the scores to memory. They support causal masks, windows and segments, but no bias, softcap,
sinks or dropout, and neither return nor edit the attention weights: with any of these, and with a cache, XLA is used.
"auto" takes cuDNN on NVIDIA GPUs in bfloat16, Pallas on a single TPU, and XLA for every shape that the device's kernel
does not support. On a CPU Pallas runs interpreted, for tests.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.context import Context
from model.errors import InputError
from model.execution import Execution
from model.layout import layer_kinds
from model.target import Target, target

_BLOCK = 128  # queries and keys in a block of the Pallas kernels; it must divide the sequence
_AUTO = {"gpu": "cudnn", "tpu": "pallas"}


class AttentionShape(NamedTuple):
    """The properties of an attention that its kernel depends on. dtype: of queries, keys and values."""

    seq: int
    head_dim: int
    dtype: str
    causal: bool = True
    window: int | None = None


def kernel_for(wanted: str, shape: AttentionShape, device: Target | None = None) -> tuple[str, str]:
    """Return (kernel, reason for it) for an attention without bias, softcap, sinks, dropout, taps and cache.

    wanted: an Execution's `attention_kernel`. device: default: what the program is being traced for. The mesh is that
    of the trace. Raises InputError if `wanted` names a kernel that does not support this shape on this device.
    """
    device = target() if device is None else device
    kernel = _AUTO.get(device.platform, "xla") if wanted == "auto" else wanted
    if kernel == "xla":
        return "xla", "attention_kernel='xla'" if wanted == "xla" else f"no fused kernel runs on a {device.platform}"
    reason = (_why_not_cudnn if kernel == "cudnn" else _why_not_pallas)(shape, device)
    if reason is None:
        return kernel, f"it takes this shape on a {device.platform}"
    if wanted != "auto":
        raise InputError(f"attention_kernel={wanted!r} cannot be used here: {reason}; take 'auto' or 'xla'")
    return "xla", f"{kernel} cannot be used here: {reason}"


def choose_kernel(context: Context, query: Float[Array, "batch heads seq head_dim"], fusible: bool) -> str:
    """Return the kernel for this attention; fusible: no option is used that only XLA supports.

    Raises InputError if the execution names a kernel that does not support this device or shape.
    """
    if not fusible:
        return "xla"
    seq, head_dim = query.shape[2:]
    shape = AttentionShape(seq, head_dim, str(query.dtype), context.causal, context.window)
    return kernel_for(context.execution.attention_kernel, shape, target(context.execution.platform))[0]


def kernels_of(config: ModelConfig, seq: int, execution: Execution = Execution()) -> dict[str, tuple[str, str]]:
    """Return {kind of layer: (kernel, reason for it)} for training the main stack on rows of `seq` tokens.

    Without dropout, which only XLA supports. Raises InputError as `kernel_for` does.
    """
    special = {
        "latent attention": config.latent is not None,
        "attention_softcap": config.attention_softcap is not None,
        "attention_sinks": config.attention_sinks,
        f"position={config.position!r}": config.position in ("alibi", "relative"),
    }
    only_xla = next((name for name, given in special.items() if given), None)
    device = target(execution.platform)
    kernels = {}
    for kind in layer_kinds(config):
        if only_xla:
            kernels[kind.name] = ("xla", f"no fused kernel supports {only_xla}")
        else:
            shape = AttentionShape(seq, config.head_dim, config.compute_dtype, kind.causal, kind.window)
            kernels[kind.name] = kernel_for(execution.attention_kernel, shape, device)
    return kernels


def _why_not_cudnn(shape: AttentionShape, device: Target) -> str | None:
    """Return why cuDNN does not support this shape, or None.

    Its limits: NVIDIA's cuDNN frontend, "Scaled Dot Product Attention".
    """
    widest = 256 if device.capability is not None and device.capability[0] == 9 else 128
    obstacles = (
        (device.platform != "gpu", f"it needs a GPU, not a {device.platform}"),
        (device.vendor == "amd", "it needs a GPU by NVIDIA, not by AMD"),
        (
            device.capability is not None and device.capability < (8, 0),
            f"it needs a GPU of compute capability 8.0, not {'.'.join(map(str, device.capability or ()))}",
        ),
        (shape.dtype != "bfloat16", f"it needs compute_dtype='bfloat16', not {shape.dtype!r}"),
        (
            shape.head_dim % 8 != 0 or shape.head_dim > widest,
            f"it takes a head_dim that is a multiple of 8 up to {widest}, not {shape.head_dim}",
        ),
        (shape.seq % 2 != 0, f"it takes sequences of an even length, not {shape.seq}"),
        (_mesh_axis("sequence") > 1, "it does not run on a mesh that splits the sequence"),
    )
    return next((reason for holds, reason in obstacles if holds), None)


def _why_not_pallas(shape: AttentionShape, device: Target) -> str | None:
    """Return why JAX's Pallas kernel for TPUs, or that for GPUs, does not support this shape, or None."""
    on_tpu, seq, head_dim = device.platform == "tpu", shape.seq, shape.head_dim
    lengths = f"multiples of {_BLOCK}" if on_tpu else f"16, 32, 64 or multiples of {_BLOCK}"
    obstacles = (
        (jax.sharding.get_abstract_mesh().size > 1, "it does not run on a mesh of several devices"),
        (_x64(), "it does not run with jax_enable_x64"),  # its indices would mix int32 with int64
        (shape.window is not None, "it does not support sliding windows"),
        (not shape.causal, "it supports only causal attention"),
        (
            seq % _BLOCK != 0 and (on_tpu or seq not in (16, 32, 64)),
            f"it takes sequences whose lengths are {lengths}, not {seq}",
        ),
        (
            on_tpu and head_dim > _BLOCK and head_dim % _BLOCK != 0,
            f"it takes a head_dim up to {_BLOCK} or a multiple of it, not {head_dim}",
        ),
        (device.platform == "gpu" and head_dim < 16, f"it takes a head_dim of at least 16, not {head_dim}"),
    )
    return next((reason for holds, reason in obstacles if holds), None)


def _x64() -> bool:
    return jax.dtypes.canonicalize_dtype("int64") == "int64"


def _mesh_axis(name: str) -> int:
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def attend_fused(
    kernel: str,
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch kv_heads seq head_dim"],
    value: Float[Array, "batch kv_heads seq head_dim"],
    context: Context,
    scale: float,
) -> Float[Array, "batch heads seq head_dim"]:
    """Return scaled dot-product attention as `model.attention.attend` does, by a fused kernel.

    The result of padding tokens is finite but otherwise undefined.
    """
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
    platform = target(context.execution.platform).platform
    repeats = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    return (
        _pallas_tpu(query, key, value, context, scale)
        if platform == "tpu"
        else _pallas(query, key, value, context, scale, interpret=platform == "cpu")
    )


def _pallas(query: Array, key: Array, value: Array, context: Context, scale: float, interpret: bool) -> Array:
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
        interpret=interpret,
    )
    return mixed.swapaxes(1, 2)


def _pallas_tpu(query: Array, key: Array, value: Array, context: Context, scale: float) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention

    ids = context.segment_ids
    segments = None if ids is None else flash_attention.SegmentIds(q=ids, kv=ids)
    return flash_attention.flash_attention(
        query, key, value, segment_ids=segments, causal=context.causal, sm_scale=scale
    )

"""What GGUF's architectures are in our words: their metadata, and the names that llama.cpp gives their tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from model.convert.rows import Row, linear, norm, table, within
from model.errors import InputError
from model.parts import Experts, RopeScaling

_REQUIRED = object()


class Metadata:
    """The values of a GGUF file whose keys start with its architecture, and the sizes that its tensors show."""

    def __init__(self, architecture: str, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]):
        self.architecture, self.values, self.shapes = architecture, values, shapes

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Raises InputError where a value without default is missing or differs from layer to layer."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is _REQUIRED:
            raise InputError(f"it has no {self.architecture}.{key}")
        if isinstance(value, (list, np.ndarray)):
            each = set(value) if isinstance(value, list) else set(value.tolist())
            if len(each) != 1:
                raise InputError(f"{self.architecture}.{key} differs between layers, which is not supported")
            (value,) = each
        # Files hold float32: 9.999999747e-06 was 1e-05.
        return float(f"{value:.7g}") if isinstance(value, float) else value


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One general.architecture.

    read: our fields. permuted: a head's rotary pairs stand beside each other in its query and key rows. plus_one: norm
    scales are stored with the one that is added to them.
    """

    read: Callable[[Metadata], dict[str, Any]]
    rows: tuple[Row, ...]
    permuted: bool = False
    plus_one: bool = False


def _shape(data: Metadata) -> dict[str, Any]:
    heads, width = data.get("attention.head_count"), data.get("embedding_length")
    if "token_embd.weight" not in data.shapes:
        raise InputError("it has no tensor token_embd.weight")
    return {
        "vocab_size": data.shapes["token_embd.weight"][0],
        "d_model": width,
        "num_layers": data.get("block_count"),
        "num_heads": heads,
        "d_ff": data.get("feed_forward_length"),
        "max_seq_len": data.get("context_length"),
        "tie_embeddings": "output.weight" not in data.shapes,
        "head": "language-model",
    }


def _rotary(data: Metadata) -> dict[str, Any]:
    """What all but GPT-2 have: RMSNorm, gates, rotary positions, and grouped heads."""
    shape = _shape(data)
    head_dim = data.get("attention.key_length", shape["d_model"] // shape["num_heads"])
    if data.get("attention.value_length", head_dim) != head_dim:
        raise InputError("its values' heads have another size than its keys', which is not supported")
    return {
        **shape,
        "num_kv_heads": data.get("attention.head_count_kv", shape["num_heads"]),
        "head_dim": head_dim,
        "position": "rotary",
        "norm": "rmsnorm",
        "norm_epsilon": data.get("attention.layer_norm_rms_epsilon"),
        "gated": True,
        "rope_base": data.get("rope.freq_base", 10_000.0),
        "rope_fraction": data.get("rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": _scaling(data),
        "attention_bias": "blk.0.attn_q.bias" in data.shapes,
        "attention_output_bias": "blk.0.attn_output.bias" in data.shapes,
    }


def _scaling(data: Metadata) -> RopeScaling | None:
    kind = data.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"rope.scaling.type={kind!r} is not supported; isoflop reads none, linear and yarn")
    factor = data.get("rope.scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if data.get(f"rope.scaling.{key}", 1.0) != 1:
            raise InputError(f"rope.scaling.{key}={data.get(f'rope.scaling.{key}')} is not supported; it must be 1")
    return RopeScaling(
        "yarn",
        factor,
        original_max_seq_len=data.get("rope.scaling.original_context_length"),
        beta_fast=data.get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=data.get("rope.scaling.yarn_beta_slow", 1.0),
    )


def _experts(data: Metadata, width_key: str) -> dict[str, Any]:
    count = data.get("expert_count", 0)
    if not count:
        return {}
    return {"experts": Experts(count, data.get("expert_used_count"), data.get(width_key))}


def _llama(data: Metadata) -> dict[str, Any]:
    return {**_rotary(data), **_experts(data, "feed_forward_length"), "use_bias": "blk.0.ffn_up.bias" in data.shapes}


def _qwen3(data: Metadata) -> dict[str, Any]:
    return {**_rotary(data), "qk_norm": True}


def _qwen3_moe(data: Metadata) -> dict[str, Any]:
    return {**_qwen3(data), **_experts(data, "expert_feed_forward_length")}


def _phi3(data: Metadata) -> dict[str, Any]:
    if "rope_factors_long.weight" in data.shapes:
        raise InputError("its rotary positions are scaled by longrope, which is not supported")
    return {**_rotary(data), "sliding_window": data.get("attention.sliding_window", 0) or None}


def _gemma(data: Metadata) -> dict[str, Any]:
    return {**_rotary(data), "activation": "gelu_tanh", "norm_offset": True, "scale_embedding": True}


def _scores_of_largest(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The 27B models, known by their depth, scale scores by the width per head, and the file does not say so."""
    largest = values["num_layers"] == layers
    return {"attention_scale": (values["d_model"] / values["num_heads"]) ** -0.5 if largest else None}


def _gemma2(data: Metadata) -> dict[str, Any]:
    values = _gemma(data)
    return {
        **values,
        **_scores_of_largest(values, 46),
        "norm_placement": "sandwich",
        "attention_softcap": data.get("attn_logit_softcapping", 50.0),
        "final_softcap": data.get("final_logit_softcapping", 30.0),
        "sliding_window": data.get("attention.sliding_window"),
        "layer_pattern": ("local", "global"),
    }


def _gemma3(data: Metadata) -> dict[str, Any]:
    values = _gemma(data)
    return {
        **values,
        **_scores_of_largest(values, 62),
        "norm_placement": "sandwich",
        "qk_norm": True,
        "rope_base": data.get("rope.freq_base", 1_000_000.0),
        "local_rope_base": data.get("rope.freq_base_swa", 10_000.0),
        "sliding_window": data.get("attention.sliding_window"),
        "layer_pattern": ("local",) * 5 + ("global",),
    }


def _gpt2(data: Metadata) -> dict[str, Any]:
    return {
        **_shape(data),
        "position": "learned",
        "norm": "layernorm",
        "norm_epsilon": data.get("attention.layer_norm_epsilon"),
        "activation": "gelu_tanh",
        "gated": False,
        "use_bias": True,
    }


_AROUND = (
    *table("embedding/tokens", "token_embd.weight"),
    *table("embedding/positions", "position_embd.weight"),
    *norm("final_norm", "output_norm"),
    Row(("head/weight",), "output.weight", transposed=True),
)
_ATTENTION = (
    *linear("attention/query", "attn_q"),
    *linear("attention/key", "attn_k"),
    *linear("attention/value", "attn_v"),
    *linear("attention/output", "attn_output"),
    *norm("attention/query_norm", "attn_q_norm"),
    *norm("attention/key_norm", "attn_k_norm"),
)
_FUSED_ATTENTION = (
    *linear(("attention/query", "attention/key", "attention/value"), "attn_qkv"),
    *linear("attention/output", "attn_output"),
)
_FEED_FORWARD = (
    *linear("feed_forward/gate", "ffn_gate"),
    *linear("feed_forward/up", "ffn_up"),
    *linear("feed_forward/down", "ffn_down"),
)
_ROUTER = linear("feed_forward/router", "ffn_gate_inp")
_EXPERTS = tuple(  # old files have a tensor for each expert
    row
    for name in ("up", "gate", "down")
    for row in (
        Row((f"feed_forward/experts/{name}",), f"ffn_{name}.{{e}}.weight", transposed=True, optional=True),
        Row((f"feed_forward/experts/{name}",), f"ffn_{name}_exps.weight", transposed=True),
    )
)
_NORMS = (*norm("attention_norm", "attn_norm"), *norm("feed_forward_norm", "ffn_norm"))
_SANDWICH = (
    *norm("attention_post_norm", "post_attention_norm"),
    *norm("feed_forward_post_norm", "post_ffw_norm"),
)


def _layers(*groups):
    return (*within("layers/{i}/", "blk.{i}.", *groups), *_AROUND)


_DENSE = _layers(_NORMS, _ATTENTION, _FEED_FORWARD)
_SPARSE = _layers(_NORMS, _ATTENTION, _FEED_FORWARD, _ROUTER, _EXPERTS)
_GEMMA = _layers(_NORMS, _SANDWICH, _ATTENTION, _FEED_FORWARD)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _SPARSE, permuted=True),
    "qwen2": Architecture(_rotary, _DENSE),
    "qwen3": Architecture(_qwen3, _DENSE),
    "qwen3moe": Architecture(_qwen3_moe, _SPARSE),
    "gemma": Architecture(_gemma, _GEMMA, plus_one=True),
    "gemma2": Architecture(_gemma2, _GEMMA, plus_one=True),
    "gemma3": Architecture(_gemma3, _GEMMA, plus_one=True),
    "phi3": Architecture(
        _phi3,
        _layers(
            _NORMS,
            _FUSED_ATTENTION,
            linear(("feed_forward/gate", "feed_forward/up"), "ffn_up"),
            linear("feed_forward/down", "ffn_down"),
        ),
    ),
    "gpt2": Architecture(_gpt2, _layers(_NORMS, _FUSED_ATTENTION, _FEED_FORWARD)),
}

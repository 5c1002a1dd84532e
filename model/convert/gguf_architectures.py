"""Architectures of GGUF files: how their metadata become a ModelConfig, and llama.cpp's names of their tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from model.convert.gguf_metadata import Metadata, shortest_decimal
from model.convert.rules import TensorRule, linear, norm, table, within
from model.convert.sliding_window import FULL, SLIDING, shortest_pattern
from model.errors import InputError
from model.parts import Experts, RopeScaling, Router

_ROUTERS: dict[int, Router] = {0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One general.architecture.

    read: metadata → fields of ModelConfig. interleaved: in query and key rows, the two features of a rotary pair are
    neighbours. plus_one: norm scales are stored as 1 + scale.
    """

    read: Callable[[Metadata], dict[str, Any]]
    rules: tuple[TensorRule, ...]
    interleaved: bool = False
    plus_one: bool = False


def _shape(data: Metadata) -> dict[str, Any]:
    heads, width = data.get("attention.head_count"), data.get("embedding_length")
    if "token_embd.weight" not in data.shapes:
        raise InputError("it has no tensor token_embd.weight")
    data.require("embedding_length_out", 0, width)
    return {
        "vocab_size": data.shapes["token_embd.weight"][0],
        "d_model": width,
        "num_layers": data.get("block_count"),
        "num_heads": heads,
        "d_ff": data.get("feed_forward_length"),
        "max_seq_len": data.get("context_length"),
        "tie_embeddings": "output.weight" not in data.shapes,
        "head": "language-model",
        "attention_scale": data.get("attention.scale", 0) or None,
        "attention_softcap": data.get("attn_logit_softcapping", 0) or None,
        "final_softcap": data.get("final_logit_softcapping", 0) or None,
    }


def _rotary(
    data: Metadata, *, scaled: bool = False, base: float = 10_000.0, local_base: float | None = None
) -> dict[str, Any]:
    """Return the fields of all architectures but GPT-2: RMSNorm, gated feed-forward, rotary positions, grouped heads.

    The keywords are properties of the architecture, which files need not repeat. scaled: embeddings are multiplied by
    √d_model. base: of rotary positions. local_base: in layers with a window, if different.
    """
    shape = _shape(data)
    width = shape["d_model"]
    head_dim = data.get("attention.key_length", width // shape["num_heads"])
    if data.get("attention.value_length", head_dim) != head_dim:
        raise InputError("its heads have values of another size than keys, which is not supported")
    rotary_dim = data.get("rope.dimension_count", head_dim)
    data.require("attention.key_length_swa", head_dim)
    data.require("attention.value_length_swa", head_dim)
    data.require("rope.dimension_count_swa", rotary_dim)
    epsilon = data.get("attention.layer_norm_rms_epsilon")
    data.require("attention.layer_norm_epsilon", epsilon)
    base = data.get("rope.freq_base", base)
    if local_base is None:
        data.require("rope.freq_base_swa", base)
    else:
        local_base = data.get("rope.freq_base_swa", local_base)
    root = shortest_decimal(float(np.float32(width**0.5)))
    data.require("embedding_scale", *((0, root) if scaled else (0, 1, root)))
    return {
        **shape,
        "num_kv_heads": data.get("attention.head_count_kv", shape["num_heads"]),
        "head_dim": head_dim,
        "position": "rotary",
        "norm": "rmsnorm",
        "norm_epsilon": epsilon,
        "gated": True,
        "scale_embedding": scaled or (root != 1 and data.get("embedding_scale", 0) == root),
        "rope_base": base,
        "local_rope_base": local_base,
        "rope_fraction": rotary_dim / head_dim,
        "rope_scaling": _scaling(data),
        "attention_bias": "blk.0.attn_q.bias" in data.shapes,
        "attention_output_bias": "blk.0.attn_output.bias" in data.shapes,
    }


def _scaling(data: Metadata) -> RopeScaling | None:
    """Return the scaling as llama.cpp reads it: linear by default, the older key as a fallback, factor 0 for none."""
    kind = data.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"rope.scaling.type={kind!r} is not supported; isoflop reads none, linear and yarn")
    factor = data.get("rope.scaling.factor", data.get("rope.scale_linear", 0))
    yarn = {
        "original_max_seq_len": data.get("rope.scaling.original_context_length", data.get("context_length")),
        "beta_fast": data.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": data.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    data.require("rope.scaling.attn_factor", 1)
    data.require("rope.scaling.yarn_attn_factor", 1)
    data.require("rope.scaling.yarn_ext_factor", -1, 1 if kind == "yarn" else 0)
    data.require("rope.scaling.yarn_log_multiplier", 0)
    if kind == "none" or factor in (0, 1):
        return None
    return RopeScaling("yarn", factor, **yarn) if kind == "yarn" else RopeScaling("linear", factor)


def _windows(data: Metadata, layers: int, *, window: int = 0, period: int = 0) -> dict[str, Any]:
    """Return the window and its layers. window, period: defaults of the architecture, for files without the keys.

    The pattern is one value per layer, true for those with the window, or a period n: every n-th layer has full
    attention; with 0 no layer has. Period 3 gives window, window, full, window, window, full, …
    """
    window = data.get("attention.sliding_window", window)
    pattern = data.per_layer("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        period = pattern
        pattern = [period == 0 or index % period < period - 1 for index in range(layers)]
    if len(pattern) < layers:
        raise InputError(
            f"attention.sliding_window_pattern has {len(pattern)} values for {layers} layers; it must have one for each"
        )
    types = [SLIDING if has_window else FULL for has_window in pattern[:layers]]
    if not window or SLIDING not in types:
        return {"sliding_window": None}
    return {"sliding_window": window, "layer_pattern": shortest_pattern(types)}


def _no_windows(data: Metadata) -> None:
    """Raise InputError for a window in an architecture whose files do not list the layers that have it."""
    data.per_layer("attention.sliding_window_pattern")
    window, length = data.get("attention.sliding_window", 0), data.get("context_length")
    if 0 < window < length:
        raise InputError(
            f"attention.sliding_window={window} is not supported for general.architecture={data.architecture!r}; "
            f"isoflop reads 0, or one that holds the context of {length}"
        )


def _experts(data: Metadata, width_key: str) -> dict[str, Any]:
    count, top_k = data.get("expert_count", 0), data.get("expert_used_count", 0)
    scale, normalise = data.get("expert_weights_scale", 0) or 1.0, data.get("expert_weights_norm", True)
    router = data.get("expert_gating_func", 0)
    data.require("expert_gating_func", *_ROUTERS)
    if not count:
        return {}
    experts = Experts(count, top_k, data.get(width_key), router=_ROUTERS[router], normalise=normalise, scale=scale)
    return {"experts": experts}


def _llama(data: Metadata) -> dict[str, Any]:
    values = _rotary(data)
    return {
        **values,
        **_experts(data, "feed_forward_length"),
        **_windows(data, values["num_layers"]),
        "use_bias": "blk.0.ffn_up.bias" in data.shapes,
    }


def _qwen2(data: Metadata) -> dict[str, Any]:
    _no_windows(data)
    return _rotary(data)


def _qwen3(data: Metadata) -> dict[str, Any]:
    return {**_qwen2(data), "qk_norm": True}


def _qwen3_moe(data: Metadata) -> dict[str, Any]:
    return {**_qwen3(data), **_experts(data, "expert_feed_forward_length")}


def _phi3(data: Metadata) -> dict[str, Any]:
    if "rope_factors_long.weight" in data.shapes:
        raise InputError("its rotary positions are scaled by longrope, which is not supported")
    values = _rotary(data)
    return {**values, **_windows(data, values["num_layers"])}


_GEMMAS = {"activation": "gelu_tanh", "norm_offset": True}


def _gemma(data: Metadata) -> dict[str, Any]:
    _no_windows(data)
    return {**_rotary(data, scaled=True), **_GEMMAS}


def _attention_scale_of_largest(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the attention scale of the 27B models, recognised by their depth, since their files do not have it."""
    if values["attention_scale"] is not None or values["num_layers"] != layers:
        return {}
    return {"attention_scale": (values["d_model"] / values["num_heads"]) ** -0.5}


def _gemma2(data: Metadata) -> dict[str, Any]:
    values = _rotary(data, scaled=True)
    return {
        **values,
        **_GEMMAS,
        **_attention_scale_of_largest(values, 46),
        **_windows(data, values["num_layers"], window=4096, period=2),
        "norm_placement": "sandwich",
        "attention_softcap": data.get("attn_logit_softcapping", 50.0) or None,
        "final_softcap": data.get("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(data: Metadata) -> dict[str, Any]:
    values = _rotary(data, scaled=True, base=1_000_000.0, local_base=10_000.0)
    return {
        **values,
        **_GEMMAS,
        **_attention_scale_of_largest(values, 62),
        **_windows(data, values["num_layers"], period=6),
        "norm_placement": "sandwich",
        "qk_norm": True,
    }


def _gpt2(data: Metadata) -> dict[str, Any]:
    values, epsilon = _shape(data), data.get("attention.layer_norm_epsilon")
    heads, width = values["num_heads"], values["d_model"]
    data.require("attention.head_count_kv", heads)
    for key in ("attention.key_length", "attention.value_length"):
        data.require(key, width // heads)
    data.require("attention.layer_norm_rms_epsilon", epsilon)
    data.require("embedding_scale", 0, 1)
    _no_windows(data)
    return {
        **values,
        "position": "learned",
        "norm": "layernorm",
        "norm_epsilon": epsilon,
        "activation": "gelu_tanh",
        "gated": False,
        "use_bias": True,
    }


_OUTSIDE_LAYERS = (
    *table("embedding/tokens", "token_embd.weight"),
    *table("embedding/positions", "position_embd.weight"),
    *norm("final_norm", "output_norm"),
    TensorRule(("head/weight",), "output.weight", transposed=True),
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
_EXPERTS = tuple(  # old files have one tensor per expert
    rule
    for name in ("up", "gate", "down")
    for rule in (
        TensorRule((f"feed_forward/experts/{name}",), f"ffn_{name}.{{e}}.weight", transposed=True, optional=True),
        TensorRule((f"feed_forward/experts/{name}",), f"ffn_{name}_exps.weight", transposed=True),
    )
)
_NORMS = (*norm("attention_norm", "attn_norm"), *norm("feed_forward_norm", "ffn_norm"))
_SANDWICH = (
    *norm("attention_post_norm", "post_attention_norm"),
    *norm("feed_forward_post_norm", "post_ffw_norm"),
)


def _layers(*groups):
    return (*within("layers/{i}/", "blk.{i}.", *groups), *_OUTSIDE_LAYERS)


_DENSE = _layers(_NORMS, _ATTENTION, _FEED_FORWARD)
_SPARSE = _layers(_NORMS, _ATTENTION, _FEED_FORWARD, _ROUTER, _EXPERTS)
_GEMMA = _layers(_NORMS, _SANDWICH, _ATTENTION, _FEED_FORWARD)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _SPARSE, interleaved=True),
    "qwen2": Architecture(_qwen2, _DENSE),
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

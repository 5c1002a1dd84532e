"""What GGUF's architectures are in our words: their metadata, and the names that llama.cpp gives their tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from model.convert.fields import FULL, SLIDING, shortest_pattern
from model.convert.rows import Row, linear, norm, table, within
from model.errors import InputError
from model.parts import Experts, RopeScaling, Router

_REQUIRED = object()
_OFF = """
    expert_shared_count expert_shared_feed_forward_length expert_chunk_feed_forward_length expert_group_scale
    experts_per_group leading_dense_block_count moe_latent_size nextn_predict_layers n_deepstack_layers pooling_type
    router_logit_softcapping swiglu_clamp_exp swiglu_clamp_shexp rescale_every_n_layers token_shift_count
    embedding_length_per_layer_input attention.clamp_kqv attention.max_alibi_bias attention.relative_buckets_count
    attention.q_lora_rank attention.kv_lora_rank attention.key_length_mla attention.value_length_mla
    attention.shared_kv_layers attention.temperature_length rope.dimension_sections
"""
_SCALES = """
    residual_scale logit_scale attention.output_scale attention.temperature_scale rope.scaling.alpha
    expert_group_count expert_group_used_count full_attention_interval moe_every_n_layers interleave_moe_layer_step
"""
# Keys of other architectures, with the values that leave the function as it is. llama.cpp takes 0 for a missing scale.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OFF.split(), (0,)),
    **dict.fromkeys(_SCALES.split(), (0, 1)),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
# The tensors' shapes say it too, or it is about how the model was made.
_SAYS_NOTHING = {"vocab_size", "expert_feed_forward_length", "rope.scaling.finetuned"}
_ROUTERS: dict[int, Router] = {0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen"}


class Metadata:
    """The values of a GGUF file whose keys start with its architecture, and the sizes that its tensors show.

    It remembers which keys were read: `check_rest` refuses the others unless they are known to change nothing.
    """

    def __init__(self, architecture: str, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]):
        self.architecture, self.values, self.shapes = architecture, values, shapes
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a value. Raises InputError where one without default is missing or differs from layer to layer."""
        value = self.every(key, default)
        if value is _REQUIRED:
            raise InputError(f"it has no {self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise InputError(f"{self.architecture}.{key} differs between layers, which is not supported")
            return value[0]
        return value

    def every(self, key: str, default: Any = None) -> Any:
        """Return a value as it is: one for each layer is a list."""
        self._read.add(key)
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, (list, np.ndarray)):
            return [_rounded(one) for one in (value if isinstance(value, list) else value.tolist())]
        return _rounded(value)

    def only(self, key: str, *allowed: Any) -> None:
        """Raise InputError where the key has another value than these, in a list for any layer."""
        value = self.every(key)
        if value is None or all(one in allowed for one in (value if isinstance(value, list) else [value])):
            return
        wanted = " or ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in dict.fromkeys(allowed))
        raise InputError(f"{self.architecture}.{key}={value!r} is not supported; isoflop reads {wanted}")

    def check_rest(self) -> None:
        """Raise InputError on a key that was not read, unless its value is known to change nothing."""
        own = [
            key.removeprefix(f"{self.architecture}.") for key in self.values if key.startswith(f"{self.architecture}.")
        ]
        rest = [key for key in own if key not in self._read | _SAYS_NOTHING]
        for key in rest:
            if key in _NEUTRAL:
                self.only(key, *_NEUTRAL[key])
        unknown = [f"{self.architecture}.{key}" for key in rest if key not in _NEUTRAL]
        if unknown:
            raise InputError(
                f"its metadata has {', '.join(unknown)}, which may change what the model computes and which isoflop "
                f"does not know for general.architecture={self.architecture!r}"
            )


def _rounded(value: Any) -> Any:
    """Return the number that a float32 was written for: 9.999999747e-06 was 1e-05."""
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
    data.only("embedding_length_out", 0, width)
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
    """Return what all but GPT-2 have: RMSNorm, gates, rotary positions, and grouped heads.

    The keywords are the architecture's, which files need not repeat. scaled: the embedding is times the root of its
    width. base: of rotary positions. local_base: of those in layers with a window, where that is another.
    """
    shape = _shape(data)
    width = shape["d_model"]
    head_dim = data.get("attention.key_length", width // shape["num_heads"])
    if data.get("attention.value_length", head_dim) != head_dim:
        raise InputError("its values' heads have another size than its keys', which is not supported")
    turned = data.get("rope.dimension_count", head_dim)
    data.only("attention.key_length_swa", head_dim)
    data.only("attention.value_length_swa", head_dim)
    data.only("rope.dimension_count_swa", turned)
    epsilon = data.get("attention.layer_norm_rms_epsilon")
    data.only("attention.layer_norm_epsilon", epsilon)
    base = data.get("rope.freq_base", base)
    if local_base is None:
        data.only("rope.freq_base_swa", base)
    else:
        local_base = data.get("rope.freq_base_swa", local_base)
    root = _rounded(float(np.float32(width**0.5)))
    data.only("embedding_scale", *((0, root) if scaled else (0, 1, root)))
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
        "rope_fraction": turned / head_dim,
        "rope_scaling": _scaling(data),
        "attention_bias": "blk.0.attn_q.bias" in data.shapes,
        "attention_output_bias": "blk.0.attn_output.bias" in data.shapes,
    }


def _scaling(data: Metadata) -> RopeScaling | None:
    """Read the scaling as llama.cpp does: linear where no kind is named, an older key after the newer, 0 for none."""
    kind = data.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"rope.scaling.type={kind!r} is not supported; isoflop reads none, linear and yarn")
    factor = data.get("rope.scaling.factor", data.get("rope.scale_linear", 0))
    yarn = {
        "original_max_seq_len": data.get("rope.scaling.original_context_length", data.get("context_length")),
        "beta_fast": data.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": data.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    data.only("rope.scaling.attn_factor", 1)
    data.only("rope.scaling.yarn_attn_factor", 1)
    data.only("rope.scaling.yarn_ext_factor", -1, 1 if kind == "yarn" else 0)
    data.only("rope.scaling.yarn_log_multiplier", 0)
    if kind == "none" or factor in (0, 1):
        return None
    return RopeScaling("yarn", factor, **yarn) if kind == "yarn" else RopeScaling("linear", factor)


def _windows(data: Metadata, layers: int, *, window: int = 0, period: int = 0) -> dict[str, Any]:
    """Return the window and the layers that have it; the keywords are the architecture's, for files without them.

    The pattern is one value for each layer, or a number n: every n-th layer sees all tokens; with 0 none does.
    """
    window = data.get("attention.sliding_window", window)
    pattern = data.every("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        pattern = [pattern == 0 or index % pattern < pattern - 1 for index in range(layers)]
    if len(pattern) < layers:
        raise InputError(
            f"attention.sliding_window_pattern has {len(pattern)} values for {layers} layers; it must have one for each"
        )
    types = [SLIDING if local else FULL for local in pattern[:layers]]
    if not window or SLIDING not in types:
        return {"sliding_window": None}
    return {"sliding_window": window, "layer_pattern": shortest_pattern(types)}


def _no_windows(data: Metadata) -> None:
    """Raise InputError on a window in an architecture whose files do not say which layers have it."""
    data.every("attention.sliding_window_pattern")
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
    data.only("expert_gating_func", *_ROUTERS)
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


def _scores_of_largest(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The 27B models, known by their depth, scale scores by the width per head, and the file does not say so."""
    if values["attention_scale"] is not None or values["num_layers"] != layers:
        return {}
    return {"attention_scale": (values["d_model"] / values["num_heads"]) ** -0.5}


def _gemma2(data: Metadata) -> dict[str, Any]:
    values = _rotary(data, scaled=True)
    return {
        **values,
        **_GEMMAS,
        **_scores_of_largest(values, 46),
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
        **_scores_of_largest(values, 62),
        **_windows(data, values["num_layers"], period=6),
        "norm_placement": "sandwich",
        "qk_norm": True,
    }


def _gpt2(data: Metadata) -> dict[str, Any]:
    values, epsilon = _shape(data), data.get("attention.layer_norm_epsilon")
    heads, width = values["num_heads"], values["d_model"]
    data.only("attention.head_count_kv", heads)
    for key in ("attention.key_length", "attention.value_length"):
        data.only(key, width // heads)
    data.only("attention.layer_norm_rms_epsilon", epsilon)
    data.only("embedding_scale", 0, 1)
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

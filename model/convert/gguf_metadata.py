"""Metadata of a GGUF file's architecture, read so that no key is overlooked."""

from typing import Any

import numpy as np

from model.errors import InputError

_REQUIRED = object()
# Keys of other architectures with the values that have no effect. For scales llama.cpp reads 0 as missing.
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
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OFF.split(), (0,)),
    **dict.fromkeys(_SCALES.split(), (0, 1)),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
# Keys that repeat the tensors' shapes, or record how the model was made.
_IGNORED = {"vocab_size", "expert_feed_forward_length", "rope.scaling.finetuned"}


class Metadata:
    """Values of a GGUF file under the prefix of its architecture, and the shapes of its tensors.

    It records which keys are read, so that `check_rest` can raise for the others unless they have no effect.
    """

    def __init__(self, architecture: str, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]):
        self.architecture, self.values, self.shapes = architecture, values, shapes
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a value. Raises InputError if it is missing without a default, or differs between layers."""
        value = self.per_layer(key, default)
        if value is _REQUIRED:
            raise InputError(f"it has no {self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise InputError(f"{self.architecture}.{key} differs between layers, which is not supported")
            return value[0]
        return value

    def per_layer(self, key: str, default: Any = None) -> Any:
        """Return a value that may be a list with one element per layer."""
        self._read.add(key)
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, list):
            return [shortest_decimal(element) for element in value]
        return shortest_decimal(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Raise InputError if the key is present with a value, or one element per layer, that is not allowed."""
        value = self.per_layer(key)
        if value is None or all(element in allowed for element in (value if isinstance(value, list) else [value])):
            return
        wanted = [f"{option:g}" if isinstance(option, float) else str(option) for option in dict.fromkeys(allowed)]
        raise InputError(f"{self.architecture}.{key}={value!r} is not supported; isoflop reads {' or '.join(wanted)}")

    def check_rest(self) -> None:
        """Raise InputError if a key was not read, unless its value has no effect."""
        prefix = f"{self.architecture}."
        keys = [key.removeprefix(prefix) for key in self.values if key.startswith(prefix)]
        rest = [key for key in keys if key not in self._read | _IGNORED]
        for key in rest:
            if key in _NEUTRAL:
                self.require(key, *_NEUTRAL[key])
        unknown = [f"{prefix}{key}" for key in rest if key not in _NEUTRAL]
        if unknown:
            raise InputError(
                f"its metadata has {', '.join(unknown)}, which may change what the model computes and which isoflop "
                f"does not know for general.architecture={self.architecture!r}"
            )


def shortest_decimal(value: Any) -> Any:
    """Return the decimal number that was stored as float32: 9.999999747e-06 was 1e-05. Other values are unchanged."""
    return float(f"{value:.7g}") if isinstance(value, float) else value

"""Gemma 2 and 3: norms before and after each sublayer, sliding windows and global layers, a large tied vocabulary."""

from typing import Any

from model.config import ModelConfig
from model.presets.preset import Preset, safetensors


def _gemma(d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int, **fields: Any) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        d_ff=d_ff,
        norm_epsilon=1e-6,
        norm_placement="sandwich",
        norm_offset=True,
        activation="gelu_tanh",
        scale_embedding=True,
        eos_token_ids=(1,),
        **fields,
    )


def _gemma2() -> ModelConfig:
    """Return Gemma 2 (Gemma Team 2024, table 1): windows in every second layer, soft-capped scores and logits."""
    return _gemma(
        2304,
        26,
        8,
        4,
        9216,
        vocab_size=256_000,
        max_seq_len=8192,
        sliding_window=4096,
        layer_pattern=("local", "global"),
        attention_softcap=50.0,
        final_softcap=30.0,
    )


def _gemma3(d_model: int, num_layers: int, d_ff: int) -> ModelConfig:
    """Return Gemma 3 (Gemma Team 2025, section 2): every sixth layer global, QK norm instead of soft caps."""
    return _gemma(
        d_model,
        num_layers,
        4,
        1,
        d_ff,
        vocab_size=262_144,
        max_seq_len=32_768,
        rope_base=1e6,
        local_rope_base=10_000.0,
        qk_norm=True,
        sliding_window=512,
        layer_pattern=("local", "local", "local", "local", "local", "global"),
    )


PRESETS = {
    "gemma2-2b": Preset(_gemma2(), 2_614_341_888, safetensors("google/gemma-2-2b")),
    "gemma3-270m": Preset(_gemma3(640, 18, 2048), 268_098_176, safetensors("google/gemma-3-270m")),
    "gemma3-1b": Preset(_gemma3(1152, 26, 6912), 999_885_952, safetensors("google/gemma-3-1b-pt")),
}

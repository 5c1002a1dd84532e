"""Qwen2 (biases of queries, keys and values) and Qwen3 (QK norm instead)."""

from typing import Any

from model.config import ModelConfig
from model.parts import Experts
from model.presets.preset import Preset, safetensors


def _qwen(d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int, **fields: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_ff=d_ff,
        rope_base=1e6,
        norm_epsilon=1e-6,
        **fields,
    )


def _qwen2(d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int) -> ModelConfig:
    """Return a base model of Qwen2 (Yang et al. 2024, table 1)."""
    fields = {"max_seq_len": 131_072, "attention_bias": True, "attention_output_bias": False}
    return _qwen(d_model, num_layers, num_heads, num_kv_heads, d_ff, eos_token_ids=(151_643,), **fields)


def _qwen3(
    d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int, tied: bool = True, **fields: Any
) -> ModelConfig:
    """Return a post-trained model of Qwen3 (Yang et al. 2025, tables 1 and 2), whose turns end with token 151,645."""
    common = {"head_dim": 128, "max_seq_len": 40_960, "qk_norm": True, "tie_embeddings": tied}
    return _qwen(d_model, num_layers, num_heads, num_kv_heads, d_ff, eos_token_ids=(151_645,), **common, **fields)


_EXPERTS = Experts(count=128, top_k=8, d_ff=768)

_TABLE = "the second copy of the tied table that its file stores"

PRESETS = {
    "qwen2-0.5b": Preset(_qwen2(896, 24, 14, 2, 4864), 494_032_768, safetensors("Qwen/Qwen2-0.5B")),
    "qwen2-1.5b": Preset(_qwen2(1536, 28, 12, 2, 8960), 1_543_714_304, safetensors("Qwen/Qwen2-1.5B")),
    "qwen3-0.6b": Preset(_qwen3(1024, 28, 16, 8, 3072), 596_049_920, safetensors("Qwen/Qwen3-0.6B", _TABLE)),
    "qwen3-1.7b": Preset(_qwen3(2048, 28, 16, 8, 6144), 1_720_574_976, safetensors("Qwen/Qwen3-1.7B", _TABLE)),
    "qwen3-30b-a3b": Preset(
        _qwen3(2048, 48, 32, 4, 6144, tied=False, experts=_EXPERTS),
        30_532_122_624,
        safetensors("Qwen/Qwen3-30B-A3B"),
    ),
}

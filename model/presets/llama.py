"""Llama and models of the same block: pre-RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

from typing import Any

from model.config import ModelConfig
from model.parts import Experts, RopeScaling
from model.presets.preset import Preset, safetensors


def _llama(d_model: int, num_layers: int, num_heads: int, d_ff: int, **fields: Any) -> ModelConfig:
    return ModelConfig(d_model=d_model, num_layers=num_layers, num_heads=num_heads, d_ff=d_ff, **fields)


def _llama2(d_model: int, num_layers: int, num_heads: int, d_ff: int, num_kv_heads: int | None = None) -> ModelConfig:
    """Return Llama 2 (Touvron et al. 2023b, section 2.2)."""
    fields = {"vocab_size": 32_000, "max_seq_len": 4096, "tie_embeddings": False, "eos_token_ids": (2,)}
    return _llama(d_model, num_layers, num_heads, d_ff, num_kv_heads=num_kv_heads, **fields)


def _llama3(d_model: int, num_layers: int, num_heads: int, d_ff: int, **fields: Any) -> ModelConfig:
    """Return Llama 3 (Grattafiori et al. 2024, table 3), by default a base model of April 2024."""
    common = {"vocab_size": 128_256, "num_kv_heads": 8, "rope_base": 500_000.0, "eos_token_ids": (128_001,)}
    defaults = {"max_seq_len": 8192, "tie_embeddings": False}
    return _llama(d_model, num_layers, num_heads, d_ff, **common, **(defaults | fields))


def _smollm2(d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int) -> ModelConfig:
    """Return SmolLM2 (Allal et al. 2025)."""
    fields = {"vocab_size": 49_152, "max_seq_len": 8192, "rope_base": 100_000.0, "eos_token_ids": (0,)}
    return _llama(d_model, num_layers, num_heads, d_ff, num_kv_heads=num_kv_heads, **fields)


def _mistral(**fields: Any) -> ModelConfig:
    """Return Mistral (Jiang et al. 2023, table 1)."""
    common = {"vocab_size": 32_000, "max_seq_len": 32_768, "tie_embeddings": False, "eos_token_ids": (2,)}
    return _llama(4096, 32, 32, 14_336, num_kv_heads=8, **common, **fields)


def _mixtral() -> ModelConfig:
    """Return Mixtral (Jiang et al. 2024, table 1): Mistral without windows, two of eight experts per layer."""
    return _mistral(rope_base=1e6, experts=Experts(count=8, top_k=2, d_ff=14_336, router="softmax_of_chosen"))


_FREQUENCIES = "the rotary frequencies that its files store"

PRESETS = {
    "llama2-7b": Preset(
        _llama2(4096, 32, 32, 11_008), 6_738_415_616, safetensors("meta-llama/Llama-2-7b-hf", _FREQUENCIES)
    ),
    "llama2-13b": Preset(
        _llama2(5120, 40, 40, 13_824), 13_015_864_320, safetensors("meta-llama/Llama-2-13b-hf", _FREQUENCIES)
    ),
    "llama2-70b": Preset(
        _llama2(8192, 80, 64, 28_672, num_kv_heads=8),
        68_976_648_192,
        safetensors("meta-llama/Llama-2-70b-hf", _FREQUENCIES),
    ),
    "llama3-8b": Preset(_llama3(4096, 32, 32, 14_336), 8_030_261_248, safetensors("meta-llama/Meta-Llama-3-8B")),
    "llama3-70b": Preset(_llama3(8192, 80, 64, 28_672), 70_553_706_496, safetensors("meta-llama/Meta-Llama-3-70B")),
    "llama3.2-1b": Preset(
        _llama3(
            2048,
            16,
            32,
            8192,
            max_seq_len=131_072,
            tie_embeddings=True,
            rope_scaling=RopeScaling("llama3", factor=32.0, original_max_seq_len=8192),
        ),
        1_235_814_400,
        safetensors("meta-llama/Llama-3.2-1B"),
    ),
    # v0.1: every layer has a window of 4,096 tokens.
    "mistral-7b": Preset(_mistral(sliding_window=4096), 7_241_732_096, safetensors("mistralai/Mistral-7B-v0.1")),
    "mixtral-8x7b": Preset(_mixtral(), 46_702_792_704, safetensors("mistralai/Mixtral-8x7B-v0.1")),
    "smollm2-135m": Preset(_smollm2(576, 30, 9, 3, 1536), 134_515_008, safetensors("HuggingFaceTB/SmolLM2-135M")),
    "smollm2-360m": Preset(_smollm2(960, 32, 15, 5, 2560), 361_821_120, safetensors("HuggingFaceTB/SmolLM2-360M")),
}

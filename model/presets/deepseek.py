"""DeepSeek-V2: latent attention, many small experts and shared experts."""

from model.config import ModelConfig
from model.parts import Experts, Latent, RopeScaling
from model.presets.preset import Preset, safetensors

# DeepSeek-AI 2024, appendix B. The two shared experts of width 1,408 are represented as one of 2,816.
_V2_LITE = ModelConfig(
    vocab_size=102_400,
    d_model=2048,
    num_layers=27,
    num_heads=16,
    d_ff=10_944,
    max_seq_len=163_840,
    rope_interleaved=True,
    rope_scaling=RopeScaling("yarn", factor=40.0, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=0.707),
    latent=Latent(kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
    norm_epsilon=1e-6,
    experts=Experts(count=64, top_k=6, d_ff=1408, shared_d_ff=2816, normalise=False, first_layer=1),
    tie_embeddings=False,
    eos_token_ids=(100_001,),
)

PRESETS = {
    "deepseek-v2-lite": Preset(_V2_LITE, 15_706_484_224, safetensors("deepseek-ai/DeepSeek-V2-Lite")),
}

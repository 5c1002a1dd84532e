"""Architectures of isoflop: the family of the scaling study, a tiny one for tests, a large sparse one for planning."""

from model.config import ModelConfig
from model.parts import Experts
from model.presets.preset import Preset

_STUDY_WIDTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024)


def _study(d_model: int) -> ModelConfig:
    """Return a Llama-like model (RMSNorm, rotary, SwiGLU, tied head) of a width that is a multiple of 4.

    It has one layer per 24 features of d_model (from 256 on, per 48), at least 3; heads of about 32 features, at least
    2; and a d_ff of 8/3 d_model, rounded to a multiple of 4. For example d_model=96 gives 4 layers, 3 heads of 32 and
    d_ff=256. Below a width of 84 only the width changes: a law fitted to models of 2 layers does not predict those of 3
    (docs/LOG.md).
    """
    num_layers = max(3, round(d_model / 24)) if d_model < 256 else max(11, round(d_model / 48))
    head_counts = [count for count in range(2, d_model) if d_model % (2 * count) == 0]  # rotary needs an even head_dim
    return ModelConfig(
        vocab_size=1024,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=min(head_counts, key=lambda count: abs(d_model / count - 32)),
        d_ff=4 * round(2 * d_model / 3),
        max_seq_len=128,
    )


# For tests: all features of the study family, in a size that compiles in a second.
_TINY = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=64)

# Not a released model, but a plan for one that decodes fast at low cost: fine-grained experts and one shared expert
# (DeepSeek-V3's router), a dense first layer, and three layers with windows of 1,024 tokens per global layer (as in
# Gemma 3), so that at a million tokens the cache is about that of ten layers.
_FLASH_MOE = ModelConfig(
    vocab_size=262_144,
    d_model=3072,
    num_layers=40,
    num_heads=24,
    num_kv_heads=4,
    head_dim=128,
    d_ff=9216,
    max_seq_len=1_048_576,
    rope_base=10_000_000.0,
    local_rope_base=10_000.0,
    qk_norm=True,
    sliding_window=1024,
    layer_pattern=("local", "local", "local", "global"),
    norm_epsilon=1e-6,
    experts=Experts(
        count=128,
        top_k=8,
        d_ff=1024,
        shared_d_ff=1024,
        router="sigmoid",
        selection_bias=True,
        scale=2.5,
        first_layer=1,
    ),
    eos_token_ids=(1,),
)

PRESETS = {
    "tiny": Preset(_TINY),
    **{f"study-{width}": Preset(_study(width)) for width in _STUDY_WIDTHS},
    "flash-moe": Preset(_FLASH_MOE),
}

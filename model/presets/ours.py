"""Architectures of our own: the family of the study, the smallest for tests, a large sparse one for plans."""

from model.config import ModelConfig
from model.parts import Experts
from model.presets.preset import Preset

_STUDY_WIDTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024)


def _study(d_model: int) -> ModelConfig:
    """Llama-like (RMSNorm, rotary, SwiGLU, tied head), its shape by one rule; d_model is a multiple of 4.

    A layer per 24 features (of wide models per 48) but at least 3, and heads of about 32 but at least 2: below width 84
    only the width changes, because where depth goes from 2 to 3 a law through the shallower models is wrong for the
    deeper ones (docs/LOG.md). d_ff is 8/3 d_model, to a multiple of 4.
    """
    heads = [count for count in range(2, d_model) if d_model % (2 * count) == 0]  # of an even size, for rotary
    return ModelConfig(
        vocab_size=1024,
        d_model=d_model,
        num_layers=max(3, round(d_model / 24)) if d_model < 256 else max(11, round(d_model / 48)),
        num_heads=min(heads, key=lambda count: abs(d_model / count - 32)),
        d_ff=4 * round(2 * d_model / 3),
        max_seq_len=128,
    )


# For tests: every idea of the study family, in a size that compiles in a second.
_TINY = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=64)

# Not a released model: a plan of the class that is served fast and cheap. Fine-grained experts with one shared
# (DeepSeek-V3's router), a first dense layer, and three windows of 1,024 for each global layer (Gemma's idea), so that
# a context of a million tokens costs the cache of ten layers.
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

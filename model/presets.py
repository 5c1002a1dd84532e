"""Named architectures. `get("study-64")` and so on: one member of the family that the study's ladder uses."""

import functools
from collections.abc import Callable

from model.config import ModelConfig
from model.errors import UnknownNameError

STUDY_WIDTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024)


def study_family(d_model: int, *, vocab_size: int = 1024, max_seq_len: int = 128) -> ModelConfig:
    """Llama-like (RMSNorm, rotary, SwiGLU, tied head), its shape by one rule; d_model is a multiple of 4.

    A layer per 24 features (of wide models per 48) but at least 3, and heads of about 32 but at least 2: below width 84
    only the width changes, because where depth goes from 2 to 3 a law through the shallower models is wrong for the
    deeper ones (docs/LOG.md). d_ff is 8/3 d_model, to a multiple of 4.
    """
    heads = [count for count in range(2, d_model) if d_model % (2 * count) == 0]  # of an even size, for rotary
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=max(3, round(d_model / 24)) if d_model < 256 else max(11, round(d_model / 48)),
        num_heads=min(heads, key=lambda count: abs(d_model / count - 32)),
        d_ff=4 * round(2 * d_model / 3),
        max_seq_len=max_seq_len,
        scan_layers=d_model >= 256,
    )


def _tiny() -> ModelConfig:
    """For tests: every idea of the study family, in a size that compiles in a second."""
    return ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, max_seq_len=64)


def _gpt2(d_model: int, num_layers: int, num_heads: int) -> Callable[[], ModelConfig]:
    """Radford et al. 2019."""
    return lambda: ModelConfig(
        vocab_size=50_257,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=1024,
        position="learned",
        norm="layernorm",
        activation="gelu_tanh",
        gated=False,
        use_bias=True,
        eos_token_ids=(50_256,),
    )


_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": _tiny,
    **{f"study-{width}": functools.partial(study_family, width) for width in STUDY_WIDTHS},
    "gpt2-small": _gpt2(768, 12, 12),
}


def names() -> tuple[str, ...]:
    """All preset names."""
    return tuple(_PRESETS)


def get(name: str) -> ModelConfig:
    """The config of that name. Raises UnknownNameError (a KeyError) that lists the close names."""
    if name not in _PRESETS:
        raise UnknownNameError("preset", name, _PRESETS)
    return _PRESETS[name]()

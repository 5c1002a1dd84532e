"""Which of our models another program can be: the fields that may differ from a plain decoder's, and the rest."""

from collections.abc import Collection, Mapping
from typing import Any

from model import ModelConfig
from model.errors import InputError

_SHAPE = {"vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len"}
# These change nothing in the logits of a model whose other fields are as they must be.
_IDLE = {"num_encoder_layers", "layer_pattern", "local_rope_base", "relative_buckets", "relative_max_distance"}
_IDLE |= {"num_labels", "base_d_model", "zero_readout", "eos_token_ids", "decoder_start_token_id"}


def check_fields(
    config: ModelConfig, free: Collection[str], words: str, some: Mapping[str, tuple[Any, ...]] | None = None
) -> None:
    """Raises InputError, with these words, for the first field that must be another.

    The shape and the fields in `free` may have any value, those in `some` the values given, all others their default.
    """
    default = ModelConfig(vocab_size=2, d_model=2, num_layers=1, num_heads=1).to_dict()
    for name, value in config.to_dict().items():
        allowed = (some or {}).get(name, (default[name],))
        if name not in {*_SHAPE, *_IDLE, *free} and value not in allowed:
            wish = " or ".join(repr(choice) for choice in allowed)
            raise InputError(f"{name}={value!r} {words}; it must be {wish}")

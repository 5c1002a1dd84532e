"""What a model is: config → parameters → logits. Pure functions, no I/O but tokenizer and convert."""

from model import accounting, presets
from model.cache import KVCache, init_cache
from model.config import ModelConfig
from model.errors import InputError
from model.transformer import Output, Params, apply, forward, head, init

__all__ = [
    "ModelConfig",
    "presets",
    "init",
    "apply",
    "forward",
    "head",
    "Output",
    "Params",
    "KVCache",
    "init_cache",
    "accounting",
    "InputError",
]

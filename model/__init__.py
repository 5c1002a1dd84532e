"""Models: config → parameters → logits. Pure functions; only tokenizer, convert and stored models do I/O."""

from typing import TYPE_CHECKING

from model.lazy import lazy

if TYPE_CHECKING:
    from model import accounting, presets
    from model.cache import KVCache, init_cache
    from model.config import ModelConfig
    from model.errors import InputError
    from model.execution import Execution
    from model.heads import head
    from model.parts import Experts, Latent, RopeScaling
    from model.stack import Params
    from model.taps import Edit
    from model.transformer import Output, apply, encode, forward, init, sentence_embedding
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "accounting": (),
            "presets": (),
            "cache": ("KVCache", "init_cache"),
            "config": ("ModelConfig",),
            "errors": ("InputError",),
            "execution": ("Execution",),
            "heads": ("head",),
            "parts": ("Experts", "Latent", "RopeScaling"),
            "stack": ("Params",),
            "taps": ("Edit",),
            "transformer": ("Output", "apply", "encode", "forward", "init", "sentence_embedding"),
        },
    )

__all__ = [
    "ModelConfig",
    "Execution",
    "RopeScaling",
    "Latent",
    "Experts",
    "presets",
    "init",
    "apply",
    "forward",
    "encode",
    "head",
    "sentence_embedding",
    "Output",
    "Params",
    "Edit",
    "KVCache",
    "init_cache",
    "accounting",
    "InputError",
]

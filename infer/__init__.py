"""Text generation and scoring: a jitted prefill/decode pair with an explicit KV cache, and the loops around it."""

from typing import TYPE_CHECKING

from infer.generate import Completion, Generated, generate, stream
from infer.prepare import prepare
from model.cache import KVCache, init_cache
from model.lazy import lazy

if TYPE_CHECKING:
    from infer.beam import Beams, beam_search
    from infer.engine import Engine
    from infer.request import Request
    from infer.sampling import GREEDY, Sampling
    from infer.scoring import Scores, score
    from infer.speculative import Speculated, generate_speculative
    from infer.step import decode_step, prefill
    from infer.text import Detokenizer
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "beam": ("Beams", "beam_search"),
            "engine": ("Engine",),
            "request": ("Request",),
            "sampling": ("GREEDY", "Sampling"),
            "scoring": ("Scores", "score"),
            "speculative": ("Speculated", "generate_speculative"),
            "step": ("decode_step", "prefill"),
            "text": ("Detokenizer",),
        },
    )

__all__ = [
    "init_cache",
    "prefill",
    "decode_step",
    "generate",
    "stream",
    "Generated",
    "Completion",
    "generate_speculative",
    "Speculated",
    "beam_search",
    "Beams",
    "Engine",
    "Request",
    "Detokenizer",
    "score",
    "Scores",
    "prepare",
    "Sampling",
    "GREEDY",
    "KVCache",
]

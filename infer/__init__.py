"""How text comes out: a jitted prefill/decode pair with an explicit cache, and the loop around it."""

from infer.generate import Completion, Generated, generate, stream
from infer.prepare import prepare
from infer.sampling import GREEDY, Sampling
from infer.step import decode_step, prefill
from model.cache import KVCache, init_cache

__all__ = [
    "init_cache",
    "prefill",
    "decode_step",
    "generate",
    "stream",
    "Generated",
    "Completion",
    "prepare",
    "Sampling",
    "GREEDY",
    "KVCache",
]

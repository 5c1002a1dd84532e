"""Random numbers for places in a stream of text: pure arithmetic, so that a resume costs nothing."""

from typing import Self

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from train.data.permutation import GOLDEN, mix


class Noise:
    """Uniform numbers for every slot of some rows, each a pure function of (seed, slot, which).

    slots: the places' own numbers, int64 [rows, seq]; the same place has the same numbers however rows are batched.
    A SplitMix64 stream per (seed, which) (Steele, Lea and Flood 2014).
    """

    def __init__(self, seed: int, slots: Int64[np.ndarray, "rows seq"]):
        self._seed, self._slots = np.uint64(seed), slots.astype(np.uint64)

    @classmethod
    def of_rows(cls, seed: int, rows: Int64[np.ndarray, " rows"], seq_len: int) -> Self:
        """Number the slots of rows of `seq_len` that follow one another in a stream, by the rows' numbers there."""
        return cls(seed, rows[:, None] * seq_len + np.arange(seq_len, dtype=np.int64))

    def uniform(self, which: int) -> Float64[np.ndarray, "rows seq"]:
        """Return numbers in [0, 1); another `which` gives others."""
        start = mix(mix(np.array([self._seed], np.uint64)) + np.uint64(which))
        return (self._bits(start) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _bits(self, start: UInt64[np.ndarray, "1"]) -> UInt64[np.ndarray, "rows seq"]:
        return mix(start + self._slots * GOLDEN)

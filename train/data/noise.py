"""Random numbers for the positions of a token stream: pure arithmetic, so that a resume costs nothing."""

from typing import Self

import numpy as np
from jaxtyping import Float64, Int64

from train.data.permutation import GOLDEN, mix


class Noise:
    """Uniform random numbers for each slot of a batch, a pure function of (seed, slot, channel).

    slots: the position of each slot in the stream, so that the numbers do not depend on how rows are batched.
    There is one SplitMix64 stream per (seed, channel) (Steele, Lea and Flood 2014).
    """

    def __init__(self, seed: int, slots: Int64[np.ndarray, "rows seq"]):
        self._seed, self._slots = np.uint64(seed), slots.astype(np.uint64)

    @classmethod
    def of_rows(cls, seed: int, rows: Int64[np.ndarray, " rows"], seq_len: int) -> Self:
        """Return the noise of rows of a stream; the slots of row r are r·seq_len to (r + 1)·seq_len - 1."""
        return cls(seed, rows[:, None] * seq_len + np.arange(seq_len, dtype=np.int64))

    def uniform(self, channel: int) -> Float64[np.ndarray, "rows seq"]:
        """Return numbers in [0, 1), independent between channels."""
        start = mix(mix(np.array([self._seed], np.uint64)) + np.uint64(channel))
        bits = mix(start + self._slots * GOLDEN)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # 53 bits fill a float64's significand

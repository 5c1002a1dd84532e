"""A seeded permutation of range(n) in constant memory: the order of the rows of an epoch."""

import math

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 6
_MIN_SIDE = 5  # on a smaller grid, six rounds shuffle a few items measurably unevenly
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))
_ROUND_OFFSETS = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN


def permute(
    index: Int64[np.ndarray, " k"], size: int, seed: int, epoch: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, " k"]:
    """Return the image of each index under the permutation of range(size) given by (seed, epoch).

    The permutation is a Feistel network on a grid of rows · columns ≥ size cells. It adds modulo the sides where the
    classic network takes the xor, so that the sides need not be powers of two. A result outside range(size) is
    permuted again until it falls inside (cycle walking; Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"). For size=40 the grid is 7 × 6: cells 40 and 41 are walked over. The grid exceeds size by less than
    √size, for tiny sizes by at most 24. `seed` is 0 to 2^64 - 1.
    """
    rows = max(_MIN_SIDE, int(np.ceil(np.sqrt(size))))
    columns = max(_MIN_SIDE, math.ceil(size / rows))
    grid = np.uint64(rows), np.uint64(columns)
    epoch_keys = mix(mix(np.array([seed], np.uint64)) + epoch.astype(np.uint64) * GOLDEN)
    round_keys = mix(epoch_keys + _ROUND_OFFSETS)
    result = _feistel(index.astype(np.uint64), round_keys, *grid)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], round_keys[:, outside], *grid)
    return result.astype(np.int64)


def _feistel(
    cells: UInt64[np.ndarray, " k"], keys: UInt64[np.ndarray, "rounds k"], rows: np.uint64, columns: np.uint64
) -> UInt64[np.ndarray, " k"]:
    """Permute the cells of a grid: each round shifts one coordinate by a hash of the other, which can be undone."""
    row, column = np.divmod(cells, columns)
    for number in range(0, _ROUNDS, 2):
        row = (row + _hash32(column + keys[number])) % rows
        column = (column + _hash32(row + keys[number + 1])) % columns
    return row * columns + column


def _hash32(x: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """Return a cheap hash below 2^32, so that adding it to a coordinate cannot overflow."""
    x = x * _FACTOR_1
    x ^= x >> _32
    x *= _FACTOR_2
    return x >> _32


def mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014); uint64 arrays wrap around without a warning."""
    x = (x ^ (x >> _30)) * _FACTOR_1
    x = (x ^ (x >> _27)) * _FACTOR_2
    return x ^ (x >> _31)

"""A seeded permutation of range(n) in constant memory: the order in which windows are read."""

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 6
_LEAST_SIDE = 5  # on a smaller grid six rounds leave the order of a few items measurably uneven
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))
_ROUND_OFFSETS = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN


def permute(
    index: Int64[np.ndarray, " k"], size: int, seed: int, epoch: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, " k"]:
    """Where `index` lies in the order of its epoch: for each (seed, epoch) a bijection of range(size).

    A Feistel network on a grid of `rows` × `columns` ≥ size cells, with modular sums in place of xor so that
    the grid needs no power of two; a cell past `size` walks on along its cycle (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains"). The grid has fewer than √size cells too many (a tiny
    size: at most 24). `seed` is 0 to 2^64 - 1.
    """
    rows = max(_LEAST_SIDE, int(np.ceil(np.sqrt(size))))
    grid = np.uint64(rows), np.uint64(max(_LEAST_SIDE, -(-size // rows)))
    start = mix(np.array([seed], np.uint64))
    round_keys = mix(mix(start + epoch.astype(np.uint64) * GOLDEN) + _ROUND_OFFSETS)
    result = _feistel(index.astype(np.uint64), round_keys, *grid)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], round_keys[:, outside], *grid)
    return result.astype(np.int64)


def _feistel(cell: np.ndarray, keys: np.ndarray, rows: np.uint64, columns: np.uint64) -> np.ndarray:
    row, column = np.divmod(cell, columns)
    for number in range(0, _ROUNDS, 2):
        row = (row + _scatter(column + keys[number])) % rows
        column = (column + _scatter(row + keys[number + 1])) % columns
    return row * columns + column


def _scatter(x: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """A cheap hash below 2^32, so that the sums above cannot wrap."""
    x = x * _FACTOR_1
    x ^= x >> _32
    x *= _FACTOR_2
    return x >> _32


def mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014); uint64 arrays wrap without a warning."""
    x = (x ^ (x >> _30)) * _FACTOR_1
    x = (x ^ (x >> _27)) * _FACTOR_2
    return x ^ (x >> _31)

"""The documents of a split: where each begins and ends in the token stream, and rows of one document each."""

import numpy as np
from jaxtyping import Int32, Int64

from model.errors import InputError
from train.data.shards import TokenShards

_SCAN_AT_ONCE = 2**22  # tokens


def document_bounds(shards: TokenShards) -> Int64[np.ndarray, "documents 2"]:
    """Where each document begins, and where the end token after it stands; memory is the result and one stretch."""
    ends = [np.empty(0, np.int64)]
    for start in range(0, len(shards), _SCAN_AT_ONCE):
        stretch = shards.windows(np.array([start]), min(_SCAN_AT_ONCE, len(shards) - start))[0]
        ends.append(start + np.flatnonzero(stretch == shards.eos_id))
    end = np.concatenate(ends)
    begin = np.concatenate([np.zeros(1, np.int64), end + 1])[: len(end)]
    return np.stack([begin, end], axis=1)


class Documents:
    """A split as documents; `len` is their number, `lengths` their tokens without the end token.

    Raises InputError where the end tokens are not one for each of the manifest's documents.
    """

    def __init__(self, shards: TokenShards):
        self.shards = shards
        self._bounds = document_bounds(shards)
        listed = shards.manifest.splits[shards.split].documents
        if len(self) != listed:
            raise InputError(
                f"the {shards.split} split of {shards.folder} has {len(self)} end tokens where its manifest lists"
                f" {listed} documents; prepare the data again"
            )

    def __len__(self) -> int:
        return len(self._bounds)

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of each document without its end token."""
        return self._bounds[:, 1] - self._bounds[:, 0]

    def count_longer(self, seq_len: int) -> int:
        """How many documents `rows` of this seq_len cuts."""
        return int(np.count_nonzero(self.lengths > seq_len))

    def rows(
        self, places: Int64[np.ndarray, " n"], seq_len: int
    ) -> tuple[Int32[np.ndarray, "n seq_len"], Int32[np.ndarray, "n seq_len"]]:
        """`tokens` and `segment_ids` of these documents, one in each row without its end token.

        A document longer than seq_len keeps its first seq_len tokens. Padding has token 0 and segment id 0, the
        document segment id 1. A document of no tokens is its end token alone, so that no row is padding only.
        """
        if seq_len < 1:
            raise InputError(f"seq_len={seq_len} must be at least 1")
        outside = places[(places < 0) | (places >= len(self))]
        if len(outside):
            raise InputError(
                f"there is no document {outside[0]} in the {self.shards.split} split of {self.shards.folder};"
                f" its {len(self)} documents are numbered from 0"
            )
        tokens = np.zeros((len(places), seq_len), np.int32)
        lengths = np.clip(self.lengths[places], 1, seq_len)
        for row, begin, length in zip(tokens, self._bounds[places, 0], lengths.tolist(), strict=True):
            row[:length] = self.shards.windows(np.array([begin]), length)[0]
        return tokens, (np.arange(seq_len) < lengths[:, None]).astype(np.int32)

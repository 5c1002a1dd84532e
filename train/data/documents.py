"""The documents of a split: where each begins and ends in the token stream, and rows of one document each."""

import numpy as np
from jaxtyping import Int32, Int64

from model.checks import check_at_least_one
from model.errors import InputError
from train.data.shards import TokenShards
from train.progress import progress_bar_if

_SCANNED_AT_ONCE = 2**24  # tokens
_TAKES_SECONDS = 2**29  # tokens


def document_ends(shards: TokenShards) -> Int64[np.ndarray, " documents"]:
    """Return where the last token of each document lies; tokens past the last end token are a document too."""
    found, scanned, count = [], 0, len(shards)
    with progress_bar_if(count >= _TAKES_SECONDS, f"finding the documents of {shards.folder}", count) as advance:
        for tokens in shards.stretches(_SCANNED_AT_ONCE):
            found.append(np.flatnonzero(tokens == shards.eos_id) + scanned)
            scanned += len(tokens)
            advance(len(tokens))
    ends = np.concatenate(found) if found else np.zeros(0, np.int64)
    past = scanned - 1 - (int(ends[-1]) if len(ends) else -1)
    return np.append(ends, scanned - 1) if past else ends


class Documents:
    """A split as documents; `len` is their number, `lengths` their tokens without the end token.

    Raises InputError where the end tokens are not one for each of the manifest's documents.
    """

    def __init__(self, shards: TokenShards):
        self.shards = shards
        self._ends = document_ends(shards)
        self._begins = np.append(0, self._ends + 1)[: len(self._ends)]
        listed = shards.manifest.splits[shards.split].documents
        if len(self) != listed:
            raise InputError(
                f"the {shards.split} split of {shards.folder} has {len(self)} end tokens where its manifest lists"
                f" {listed} documents; prepare the data again"
            )

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of each document without its end token."""
        return self._ends - self._begins

    def rows(
        self, places: Int64[np.ndarray, " n"], seq_len: int
    ) -> tuple[Int32[np.ndarray, "n seq_len"], Int32[np.ndarray, "n seq_len"]]:
        """`tokens` and `segment_ids` of these documents, one in each row without its end token.

        A document longer than seq_len keeps its first seq_len tokens. Padding has token 0 and segment id 0, the
        document segment id 1. A document of no tokens is its end token alone, so that no row is padding only.
        """
        check_at_least_one(seq_len=seq_len)
        outside = places[(places < 0) | (places >= len(self))]
        if len(outside):
            raise InputError(
                f"there is no document {outside[0]} in the {self.shards.split} split of {self.shards.folder};"
                f" its {len(self)} documents are numbered from 0"
            )
        lengths = np.clip(self.lengths[places], 1, seq_len)
        filled = np.arange(seq_len) < lengths[:, None]
        tokens = np.zeros(filled.shape, np.int32)
        tokens[filled] = self.shards.spans(self._begins[places], lengths)
        return tokens, filled.astype(np.int32)

"""Documents of a split: their boundaries in the token stream, and rows of one document each."""

import numpy as np
from jaxtyping import Int32, Int64

from model.errors import InputError, check_at_least_one
from train.data.shards import TokenShards
from train.progress import progress_bar_if

_SCANNED_AT_ONCE = 2**24  # tokens
_TAKES_SECONDS = 2**29  # tokens


def document_ends(shards: TokenShards) -> Int64[np.ndarray, " documents"]:
    """Return the position of each document's last token.

    A folder of examples stores them. In text, each end token ends a document; tokens after the last one are one too.
    """
    if shards.manifest.kind != "text":
        stored = shards.array("ends")
        assert stored is not None
        return stored
    found, scanned, count = [], 0, len(shards)
    with progress_bar_if(count >= _TAKES_SECONDS, f"finding the documents of {shards.folder}", count) as advance:
        for tokens in shards.stretches(_SCANNED_AT_ONCE):
            found.append(np.flatnonzero(tokens == shards.eos_id) + scanned)
            scanned += len(tokens)
            advance(len(tokens))
    ends = np.concatenate(found) if found else np.zeros(0, np.int64)
    last_end = int(ends[-1]) if len(ends) else -1
    if last_end < scanned - 1:
        ends = np.append(ends, scanned - 1)
    return ends


class Documents:
    """Documents of a split; `len` is their number.

    Raises InputError if the split does not have one end token per document that its manifest lists.
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
        """Tokens per document, without the end token."""
        return self._ends - self._begins

    def rows(
        self, indices: Int64[np.ndarray, " n"], seq_len: int
    ) -> tuple[Int32[np.ndarray, "n seq_len"], Int32[np.ndarray, "n seq_len"]]:
        """Return `tokens` and `segment_ids`, one document per row, without end tokens.

        A document longer than seq_len is truncated to its first seq_len tokens. Segment ids are 1 for the document
        and 0 for padding, whose tokens are 0. An empty document becomes its end token, so that no row is all padding.
        Raises InputError for an index outside the split.
        """
        check_at_least_one(seq_len=seq_len)
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise InputError(
                f"there is no document {outside[0]} in the {self.shards.split} split of {self.shards.folder};"
                f" its {len(self)} documents are numbered from 0"
            )
        lengths = np.clip(self.lengths[indices], 1, seq_len)
        filled = np.arange(seq_len) < lengths[:, None]
        tokens = np.zeros(filled.shape, np.int32)
        tokens[filled] = self.shards.spans(self._begins[indices], lengths)
        return tokens, filled.astype(np.int32)

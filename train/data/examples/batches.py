"""Batches of examples: conversations packed into rows, and pairs and ratings with a document in each row."""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32, Int64

from model.errors import InputError, check_at_least_one
from train.data.documents import document_ends
from train.data.kinds import check_kind
from train.data.packing import Packing
from train.data.rows import Batch, PackedDocuments, Rows
from train.data.shards import TokenShards, TrainedMask

_DOCUMENTS = 2  # of a pair, and of a rated example


class PackedConversations(PackedDocuments):
    """Whole conversations, packed by best fit; `loss_mask` is 1 where the target is a token that is trained.

    A conversation of n tokens takes n - 1 slots, and none is divided. A folder of kind=text is packed as
    `PackedDocuments` does, every token trained, so that a mixture can hold both. Raises InputError where the longest
    conversation does not fit into a row.
    """

    KINDS = ("chat", "text")

    def __init__(self, shards: TokenShards, seq_len: int):
        super().__init__(shards, seq_len)
        longest = shards.manifest.longest
        if shards.manifest.kind == "chat" and longest - 1 > seq_len:
            raise InputError(
                f"the longest conversation of {shards.folder} has {longest} tokens, which take {longest - 1} slots"
                f" where seq_len={seq_len}; prepare again with --max-tokens {seq_len + 1}, or take"
                f" seq_len={longest - 1}"
            )
        self._trained = TrainedMask(shards) if shards.manifest.kind == "chat" else None

    def _loss_mask(
        self, starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"]
    ) -> Float32[np.ndarray, " slots"]:
        """Return 1 for each target that is trained."""
        if self._trained is None:
            return super()._loss_mask(starts, lengths)
        return self._trained.spans(starts + 1, lengths).astype(np.float32)


class Conversations(PackedConversations):
    """Conversations as `PackedConversations` has them, one in each row, in the order of the folder."""

    def __init__(self, shards: TokenShards, seq_len: int):
        super().__init__(shards, seq_len)
        ends = document_ends(shards)
        starts = np.append(0, ends + 1)[: len(ends)]
        predicted = ends > starts
        first = np.arange(int(predicted.sum()) + 1, dtype=np.int64)
        lengths = (ends - starts)[predicted].astype(np.int32)
        statistics = dataclasses.replace(
            self._packing.statistics,
            rows=len(lengths),
            fill=float(lengths.sum()) / max(1, len(lengths) * seq_len),
        )
        self._packing = Packing(starts[predicted], lengths, first, statistics)


class _DocumentRows:
    """The documents of a split, one in each row, and which tokens of each are trained."""

    def __init__(self, shards: TokenShards, seq_len: int, reference: Float32[np.ndarray, " documents"] | None):
        longest = shards.manifest.longest
        if longest > seq_len:
            raise InputError(
                f"the longest document of {shards.folder} has {longest} tokens, more than seq_len={seq_len}; prepare"
                f" again with --max-tokens {seq_len}, or take seq_len={longest}"
            )
        self.shards, self.seq_len, self.reference = shards, seq_len, reference
        self._trained = TrainedMask(shards)
        self._ends = document_ends(shards)
        self._begins = np.append(0, self._ends + 1)[: len(self._ends)]
        if reference is not None and reference.shape != self._ends.shape:
            raise InputError(
                f"reference has the shape {reference.shape} where the {shards.split} split of {shards.folder} has"
                f" {len(self._ends)} documents; give one number for each"
            )

    def __len__(self) -> int:
        return len(self._ends) // _DOCUMENTS

    def read(self, documents: Int64[np.ndarray, " n"], prefix: str = "") -> Batch:
        """Return `tokens`, `mask` and `segment_ids` [n, seq_len] of these documents, each name after the prefix."""
        lengths = (self._ends - self._begins + 1)[documents]
        filled = np.arange(self.seq_len) < lengths[:, None]
        tokens, mask = np.zeros(filled.shape, np.int32), np.zeros(filled.shape, np.float32)
        tokens[filled] = self.shards.spans(self._begins[documents], lengths)
        mask[filled] = self._trained.spans(self._begins[documents], lengths)
        parts = {"tokens": tokens, "mask": mask, "segment_ids": filled.astype(np.int32)}
        return {prefix + name: values for name, values in parts.items()}


class PairRows:
    """Pairs of a chosen and a rejected document, one pair an example.

    reference: the reference model's log-probability of what is trained in each document of the split (two for each
    pair: chosen, then rejected), or None. tails: the part of it that is of the tokens by which a document is the longer
    one of its pair, or None. Raises InputError where a document is longer than seq_len.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        reference: Float32[np.ndarray, " documents"] | None = None,
        tails: Float32[np.ndarray, " documents"] | None = None,
    ):
        check_kind(shards, "preference")
        self.shards, self.seq_len, self._tails = shards, seq_len, tails
        self._documents = _DocumentRows(shards, seq_len, reference)
        self._weights, self._margins = shards.array("weights"), shards.array("margins")

    def __len__(self) -> int:
        return len(self._documents)

    def take(self, indices: Int64[np.ndarray, " n"]) -> Batch:
        """Return the pairs of these indices.

        chosen_tokens, rejected_tokens, chosen_segment_ids, rejected_segment_ids (1, and 0 where the row is not filled)
        int32, chosen_mask, rejected_mask (1 where that token is trained) float32, all [n, seq_len]; weights float32
        [n]; margins float32 [n] where the folder has them; with a reference also reference_chosen and
        reference_rejected float32 [n], and with tails reference_chosen_tail and reference_rejected_tail.
        """
        chosen, rejected = _DOCUMENTS * indices, _DOCUMENTS * indices + 1
        batch = self._documents.read(chosen, "chosen_") | self._documents.read(rejected, "rejected_")
        assert self._weights is not None
        batch["weights"] = self._weights[indices]
        if self._margins is not None:
            batch["margins"] = self._margins[indices]
        reference = self._documents.reference
        if reference is not None:
            batch |= {"reference_chosen": reference[chosen], "reference_rejected": reference[rejected]}
        if self._tails is not None:
            batch |= {"reference_chosen_tail": self._tails[chosen], "reference_rejected_tail": self._tails[rejected]}
        return batch


class RatedRows:
    """Answers with labels, each with a mismatch: the same prompt with an answer to another prompt.

    reference: the reference model's log-probability of what is trained in each document of the split (two for each
    example: the answer, then its mismatch), or None. Raises InputError where a document is longer than seq_len.
    """

    def __init__(self, shards: TokenShards, seq_len: int, reference: Float32[np.ndarray, " documents"] | None = None):
        check_kind(shards, "rated")
        self.shards, self.seq_len = shards, seq_len
        self._documents = _DocumentRows(shards, seq_len, reference)
        self._labels = shards.array("labels")

    def __len__(self) -> int:
        return len(self._documents)

    def take(self, indices: Int64[np.ndarray, " n"]) -> Batch:
        """Return the examples of these indices.

        tokens, segment_ids (1, and 0 where the row is not filled) int32 and mask (1 where that token is trained)
        float32 [n, seq_len], and the same of the mismatch: mismatched_tokens, …; labels int32 [n], 1 for good answers;
        with a reference also reference and mismatched_reference float32 [n].
        """
        own, mismatched = _DOCUMENTS * indices, _DOCUMENTS * indices + 1
        batch = self._documents.read(own) | self._documents.read(mismatched, "mismatched_")
        assert self._labels is not None
        batch["labels"] = self._labels[indices]
        reference = self._documents.reference
        if reference is not None:
            batch |= {"reference": reference[own], "mismatched_reference": reference[mismatched]}
        return batch


def validation_examples(rows: Rows, batch_size: int, max_tokens: int | None = None) -> list[Batch]:
    """Return the first examples in order, as batches of one shape.

    max_tokens: examples are taken as long as their filled tokens are no more than this together, but one at least;
    None: all. What fills up the last batch is 0 throughout; `RatedRows` has `weights` float32 [batch], there 0, else 1.
    """
    check_at_least_one(batch_size=batch_size)
    if max_tokens is not None:
        check_at_least_one(max_tokens=max_tokens)
    batches: list[Batch] = []
    left = max_tokens
    for start in range(0, len(rows), batch_size):
        batch = rows.take(np.arange(start, min(start + batch_size, len(rows)), dtype=np.int64))
        count = len(next(iter(batch.values())))
        if left is not None:
            total = np.cumsum(_filled(batch))
            fitting = int(np.searchsorted(total, left, side="right"))
            left -= int(total[-1])
            is_last = fitting < count
            count = max(fitting, 0 if batches else 1)
        else:
            is_last = False
        if isinstance(rows, RatedRows):
            batch["weights"] = np.ones(count, np.float32)
        if count:
            batches.append({name: _padded(values[:count], batch_size) for name, values in batch.items()})
        if is_last:
            break
    return batches


def _filled(batch: Batch) -> Int64[np.ndarray, " rows"]:
    """Return the tokens of each row that are no padding, those of both documents of a pair."""
    parts = [values > 0 for name, values in batch.items() if name.endswith("segment_ids")]
    return np.stack(parts).sum(axis=(0, 2), dtype=np.int64)


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(values, [(0, rows - len(values))] + [(0, 0)] * (values.ndim - 1))


def completions(shards: TokenShards) -> list[tuple[Int32[np.ndarray, " context"], Int32[np.ndarray, " continuation"]]]:
    """Return (context ids, ids of what is trained) of each document, in the order of the shards.

    The context is all that stands before the first token that is trained; what stands after the last one is left out.
    """
    check_kind(shards, "preference", "rated")
    ends = document_ends(shards)
    begins = np.append(0, ends + 1)[: len(ends)]
    trained, result = TrainedMask(shards), []
    for begin, end in zip(begins, ends, strict=True):
        span = np.array([begin]), np.array([end - begin + 1])
        tokens, places = shards.spans(*span), np.flatnonzero(trained.spans(*span))
        first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (len(tokens), len(tokens))
        result.append((tokens[:first], tokens[first:last]))
    return result

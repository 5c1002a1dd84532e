"""Labelled documents as batches of one document per row, for classifiers."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from model.errors import InputError, check_at_least_one
from train.data.documents import Documents
from train.data.kinds import check_kind
from train.data.loader import Batch
from train.data.shards import TokenShards


def classes_of(shards: TokenShards) -> tuple[str, ...]:
    """Return the class names, in the order of the label indices.

    Raises InputError if the folder was prepared without labels.
    """
    check_kind(shards, "text")
    if not shards.manifest.labels:
        raise InputError(
            f"{shards.folder} has no labels; prepare a folder with labels by"
            " `isoflop data prepare SOURCE --out FOLDER --label-field FIELD`"
        )
    return shards.manifest.labels


class LabelledDocuments:
    """Labelled documents of a split; `len` is their number, `classes` are the class names.

    Raises InputError if the folder was prepared without labels.
    """

    def __init__(self, shards: TokenShards, seq_len: int):
        classes = classes_of(shards)
        check_at_least_one(seq_len=seq_len)
        self.documents, self.seq_len, self.classes = Documents(shards), seq_len, classes
        self._labels = np.load(shards.folder / shards.manifest.label_files[shards.split].name)

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, indices: Int64[np.ndarray, " n"]) -> Batch:
        """Return `tokens` and `segment_ids` (see `Documents.rows`), int32 [n, seq_len], and `labels`, int32 [n]."""
        tokens, segment_ids = self.documents.rows(indices, self.seq_len)
        return {"tokens": tokens, "segment_ids": segment_ids, "labels": self._labels[indices].astype(np.int32)}


def labelled_validation(
    folder: str | Path, batch_size: int, seq_len: int, max_tokens: int | None = None
) -> list[Batch]:
    """Return the first labelled documents of the validation split, in order, as batches of one shape.

    max_tokens: upper limit on the total of tokens after truncation to seq_len, but at least one document is returned;
    None: all documents. Each batch has a `loss_mask`, float32 [batch], which is 0 for the padding rows that complete
    the last batch.
    """
    check_at_least_one(batch_size=batch_size)
    if max_tokens is not None:
        check_at_least_one(max_tokens=max_tokens)
    labelled = LabelledDocuments(TokenShards(folder, "validation"), seq_len)
    count = len(labelled)
    if max_tokens is not None:
        total = np.cumsum(np.minimum(labelled.documents.lengths, seq_len))
        count = max(1, int(np.searchsorted(total, max_tokens, side="right")))
    batches = []
    for start in range(0, count, batch_size):
        batch = labelled.take(np.arange(start, min(start + batch_size, count)))
        real = len(batch["labels"])
        batch["loss_mask"] = np.ones(real, np.float32)
        batches.append({name: _pad_rows(array, batch_size - real) for name, array in batch.items()})
    return batches


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, [(0, rows)] + [(0, 0)] * (array.ndim - 1))

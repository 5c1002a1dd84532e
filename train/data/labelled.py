"""Documents with their labels, as batches of one document a row: what a classifier is trained and validated on."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from model.checks import check_at_least_one
from model.errors import InputError
from train.data.documents import Documents
from train.data.loader import Batch
from train.data.shards import TokenShards


def classes_of(shards: TokenShards) -> tuple[str, ...]:
    """Return the names that the labels index. Raises InputError where the folder was prepared without labels."""
    if not shards.manifest.labels:
        raise InputError(
            f"{shards.folder} has no labels; make a folder that has them with"
            " `isoflop data prepare SOURCE --out FOLDER --label-field FIELD`"
        )
    return shards.manifest.labels


class LabelledDocuments:
    """The labelled documents of a split; `len` is their number, `classes` the names that the labels index.

    Raises InputError where the folder was prepared without labels.
    """

    def __init__(self, shards: TokenShards, seq_len: int):
        classes = classes_of(shards)
        check_at_least_one(seq_len=seq_len)
        self.documents, self.seq_len, self.classes = Documents(shards), seq_len, classes
        self._labels = np.load(shards.folder / shards.manifest.label_files[shards.split].name)

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, places: Int64[np.ndarray, " n"]) -> Batch:
        """`tokens` and `segment_ids` int32 [n, seq_len], as `Documents.rows` has them, and `labels` int32 [n]."""
        tokens, segment_ids = self.documents.rows(places, self.seq_len)
        return {"tokens": tokens, "segment_ids": segment_ids, "labels": self._labels[places].astype(np.int32)}


def labelled_validation(
    folder: str | Path, batch_size: int, seq_len: int, max_tokens: int | None = None
) -> list[Batch]:
    """The first labelled documents of the validation split, in order, as batches of one shape.

    max_tokens: documents are taken as long as their tokens, each cut at seq_len, are no more than this together, but
    one at least; None: all. Each batch has `loss_mask` float32 [batch]: 0 for the rows that fill up the last batch,
    which are all padding.
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
        batches.append(
            {name: np.pad(part, [(0, batch_size - real)] + [(0, 0)] * (part.ndim - 1)) for name, part in batch.items()}
        )
    return batches

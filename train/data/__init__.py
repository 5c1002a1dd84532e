"""Data: from raw text to batches, as NumPy arrays."""

from train.data.examples.batches import PackedConversations, PairRows, RatedRows, completions, validation_examples
from train.data.kinds import check_kind
from train.data.labelled import LabelledDocuments, labelled_validation
from train.data.loader import Loader, batches_in_order, validation_batches
from train.data.manifest import load_manifest
from train.data.mixture import PhasedLoader
from train.data.prepare import prepare
from train.data.same_ids import gives_ids_of
from train.data.sources import open_source

__all__ = [
    "prepare",
    "load_manifest",
    "Loader",
    "PhasedLoader",
    "batches_in_order",
    "validation_batches",
    "LabelledDocuments",
    "labelled_validation",
    "PackedConversations",
    "PairRows",
    "RatedRows",
    "validation_examples",
    "completions",
    "check_kind",
    "open_source",
    "gives_ids_of",
]

"""Tokenizers compared with the ids in a data folder."""

from pathlib import Path

import numpy as np

from model.tokenizer import Tokenizer, load_tokenizer
from model.tokenizer.files import file_hashes, tokenizer_files
from model.tokenizer.same import same_ids
from train.data.shards import TokenShards

_SAMPLE = 2**15  # tokens


def gives_ids_of(tokenizer: Tokenizer, folder: str | Path) -> bool:
    """Return whether a tokenizer encodes text to the same ids as the tokenizer of a data folder.

    If their files differ, both tokenizers encode sample texts (`same_ids`) and the beginning of the validation split.
    """
    shards = TokenShards(folder, "validation")
    if file_hashes(tokenizer_files(tokenizer)) == shards.manifest.tokenizer_files:
        return True
    return _encodes_like_own(tokenizer, shards)


def have_same_ids(first: TokenShards, second: TokenShards) -> bool:
    """Return whether two data folders were prepared with equivalent tokenizers."""
    if first.manifest.tokenizer_files == second.manifest.tokenizer_files:
        return True
    return first.eos_id == second.eos_id and _encodes_like_own(load_tokenizer(first.folder), second)


def _encodes_like_own(tokenizer: Tokenizer, shards: TokenShards) -> bool:
    own = load_tokenizer(shards.folder)
    ids = shards.windows(np.array([0]), min(_SAMPLE, len(shards)))[0]
    documents = np.split(ids, np.flatnonzero(ids == shards.eos_id) + 1)
    return same_ids(tokenizer, own, [own.decode(part.tolist()) for part in documents])

"""Compute the log-probabilities of answers under a reference model once, and keep them with the data by a hash."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from infer import score
from model import Execution, ModelConfig, Params
from model.checkpoint import parameters_sha256
from model.errors import InputError
from train.data.examples.batches import completions
from train.data.manifest import SPLITS, load_manifest
from train.data.shards import TokenShards
from train.files import is_full

FOLDER = "reference"
_VERSION = 1  # of the definition of the numbers
_TAIL = "-tail"


def reference_name(data: str | Path, config: ModelConfig, sha256: str) -> str:
    """Return the name of the log-probabilities of these data by a model whose parameters have this SHA-256."""
    return hashlib.sha256(json.dumps(_content(data, config, sha256), sort_keys=True).encode()).hexdigest()[:16]


def _content(data: str | Path, config: ModelConfig, sha256: str) -> dict[str, Any]:
    return {"version": _VERSION, "data": load_manifest(data).hash, "parameters": sha256, "config": config.to_dict()}


def keep_reference(
    data: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    sha256: str | None = None,
    batch_size: int = 16,
    execution: Execution = Execution(),
) -> str:
    """Compute the log-probability of every answer of a data folder, and return the name under which it is kept there.

    Nothing is computed if it is there already. The numbers are in DATA/reference/NAME/SPLIT.npy, float32, natural,
    one per document, summed over its trained tokens; of pairs also the part of each sum that is of the tokens by which
    one answer is longer than the other, in SPLIT-tail.npy. sha256: of the parameters
    (`model.checkpoint.parameters_sha256`), if it is known. Raises InputError if the folder cannot be written to, or a
    document is longer than the model's context.
    """
    data, sha256 = Path(data), sha256 or parameters_sha256(params)
    name = reference_name(data, config, sha256)
    place = data / FOLDER / name
    if place.is_dir():
        return name
    parts = {}
    for split in SPLITS:
        shards = TokenShards(data, split)
        scores = score(config, params, completions(shards), batch_size=batch_size, execution=execution)
        parts[split] = scores.logprobs.astype(np.float32)
        if shards.manifest.kind == "preference":
            parts[f"{split}{_TAIL}"] = _tails(scores.tokens)
    beside = place.with_name(f".{name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        for part, logprobs in parts.items():
            np.save(beside / f"{part}.npy", logprobs)
        about = json.dumps(_content(data, config, sha256), indent=2)
        (beside / "about.json").write_text(about + "\n", encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        if place.is_dir():  # another process was faster
            return name
        if is_full(error):
            raise
        raise InputError(
            f"the reference log-probabilities cannot be written into {data / FOLDER}: {error.strerror}; "
            "give a copy of the data folder that can be written to"
        ) from error
    return name


def read_reference(shards: TokenShards, name: str) -> Float32[np.ndarray, " documents"]:
    """Return the sums that `keep_reference` kept of a split under this name.

    Raises InputError if they are missing or damaged.
    """
    logprobs = _read(shards, shards.folder / FOLDER / name / f"{shards.split}.npy")
    if logprobs is None:
        raise InputError(
            f"{shards.folder} has no reference log-probabilities {name}; make them with `isoflop tune` "
            "(train.reference.keep_reference)"
        )
    return logprobs


def read_reference_tails(shards: TokenShards, name: str) -> Float32[np.ndarray, " documents"] | None:
    """Return the part of the sums of `read_reference` that is of the tokens by which an answer is the longer one.

    None where an older version kept the sums alone. Raises InputError if the file is damaged.
    """
    return _read(shards, shards.folder / FOLDER / name / f"{shards.split}{_TAIL}.npy")


def _tails(tokens: list[list[float]]) -> Float32[np.ndarray, " documents"]:
    """Return Σ log p of each document's tokens beyond the length of the other document of its pair."""
    tails = []
    for number, own in enumerate(tokens):
        other = tokens[number ^ 1]  # documents 0 and 1 are a pair, 2 and 3, …
        tails.append(sum(own[len(other) :]))
    return np.array(tails, np.float32)


def _read(shards: TokenShards, file: Path) -> Float32[np.ndarray, " documents"] | None:
    """Return a number for each document of a split, None if there is no such file."""
    documents = shards.manifest.splits[shards.split].documents
    try:
        logprobs = np.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is damaged ({error}); remove its folder and tune again") from error
    if logprobs.shape != (documents,) or logprobs.dtype != np.float32:
        raise InputError(f"{file} is not of these {documents} documents; remove its folder and tune again")
    return logprobs

"""Token shards: .npy files of ids, one document after another, read through a memory map."""

import bisect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, Int32, Integer, Shaped

from model.errors import InputError, check_at_least_one
from train.data.manifest import SPLITS, Manifest, Shard, load_manifest
from train.files import file_sha256


class ShardWriter:
    """Writer of `NAME-SPLIT-00000.npy`, …, each of `shard_tokens` tokens; it buffers nothing between writes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, name: str = "tokens"):
        check_at_least_one(shard_tokens=shard_tokens)
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, shard_tokens
        self._name = name
        self._file: BinaryIO | None = None
        self._tokens = 0
        self._shards: list[Shard] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, ids: Integer[np.ndarray, " n"]) -> None:
        """Append ids, and begin the next file when one is full."""
        ids = ids.astype(self._dtype, copy=False)
        while len(ids):
            if self._file is None:
                self._file = self._path().open("w+b")
                self._header()
            room = self._limit - self._tokens
            self._file.write(ids[:room].tobytes())
            self._tokens += len(ids[:room])
            ids = ids[room:]
            if self._tokens == self._limit:
                self._finish_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Complete the last file and return all of them."""
        if self._file is not None:
            self._finish_shard()
        return tuple(self._shards)

    def _path(self) -> Path:
        return self._folder / f"{self._name}-{self._split}-{len(self._shards):05d}.npy"

    def _header(self) -> int:
        assert self._file is not None
        self._file.seek(0)
        # NumPy pads the header for an axis of 21 digits, so it keeps its length when it is rewritten.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def _finish_shard(self) -> None:
        assert self._file is not None
        start = self._header()
        self._file.seek(0, 2)
        if self._file.tell() != start + self._tokens * self._dtype.itemsize:
            raise OSError(f"{self._path()} was not written in full")
        self._file.close()
        self._file = None
        self._shards.append(Shard(self._path().name, self._tokens, file_sha256(self._path())))
        self._tokens = 0


class _Sequence:
    """Whole numbers of one split of a prepared folder, in several files, as a single sequence."""

    def __init__(self, folder: Path, split: str, names: Iterable[str]):
        self.folder, self.split = folder, split
        # asarray drops memmap's per-slice bookkeeping; pages still come from the file as they are touched.
        self._arrays = [np.asarray(np.load(folder / name, mmap_mode="r")) for name in names]
        self._starts = [0]
        for array in self._arrays:
            self._starts.append(self._starts[-1] + len(array))

    def __len__(self) -> int:
        return self._starts[-1]

    def windows(self, starts: Int[np.ndarray, " n"], length: int) -> Int32[np.ndarray, "n length"]:
        """Return `length` tokens from each start, across shard boundaries. Raises InputError outside the split."""
        result = np.empty((len(starts), length), np.int32)
        for row, start in zip(result, starts.tolist(), strict=True):
            self._read(start, row)
        return result

    def spans(self, starts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " total"]:
        """Return the concatenated tokens of spans of different lengths. Raises InputError outside the split."""
        ends = np.cumsum(lengths).tolist()
        result = np.empty(ends[-1] if ends else 0, np.int32)
        for start, begin, end in zip(starts.tolist(), [0, *ends[:-1]], ends, strict=True):
            self._read(start, result[begin:end])
        return result

    def stretches(self, length: int) -> Iterator[Integer[np.ndarray, " n"]]:
        """Yield all tokens in order, at most `length` at a time, in the dtype of the files."""
        for array in self._arrays:
            for start in range(0, len(array), length):
                yield array[start : start + length]

    def _read(self, start: int, out: Int32[np.ndarray, " length"]) -> None:
        """Fill `out` with the tokens from `start` on."""
        length = len(out)
        if start < 0 or start + length > len(self):
            raise InputError(
                f"tokens {start} to {start + length - 1} are outside the {self.split} split of {self.folder}, which has"
                f" {len(self)} tokens"
            )
        filled, shard = 0, bisect.bisect_right(self._starts, start) - 1
        while filled < length:
            offset = start + filled - self._starts[shard]
            part = self._arrays[shard][offset : offset + length - filled]  # ends at the shard's end at the latest
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1


class TokenShards(_Sequence):
    """Tokens of one split of a prepared folder, as a single sequence; `len` is their number."""

    def __init__(self, folder: str | Path, split: str = "train"):
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; a data folder has {' and '.join(SPLITS)}")
        self.manifest: Manifest = load_manifest(folder)
        self.eos_id = self.manifest.eos_id
        super().__init__(Path(folder), split, [shard.name for shard in self.manifest.splits[split].shards])

    def array(self, name: str) -> Shaped[np.ndarray, " n"] | None:
        """Return the numbers in `NAME-SPLIT.npy`; None where the folder has no such file."""
        files = [file.name for file in self.manifest.array_files.get(self.split, ())]
        file = f"{name}-{self.split}.npy"
        return np.load(self.folder / file) if file in files else None


class TrainedMask(_Sequence):
    """1 for each token of a split of examples that is trained, else 0; `len` is the number of tokens."""

    def __init__(self, shards: TokenShards):
        files = [file.name for file in shards.manifest.array_files.get(shards.split, ())]
        super().__init__(shards.folder, shards.split, [name for name in files if name.startswith("trained-")])

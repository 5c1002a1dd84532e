"""The header of a GGUF file: its metadata, and the shape, type and offset of every tensor.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package creates several
arrays for every string, which takes seconds for a vocabulary of 49,000, many times longer than this one.
"""

import dataclasses
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from model.errors import InputError

_MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The shape of a tensor, outermost axis first, GGML's number of its type, and its offset in the file in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a GGUF file. In the metadata, arrays of numbers are NumPy arrays, arrays of strings are lists."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    big_endian: bool


def read_gguf_header(path: str | Path) -> Header:
    """Read the header of a GGUF file of version 2 or 3, of either byte order.

    Raises InputError if the file is not GGUF, ends before its weights or has an unknown type of value. Whether the
    weights are complete is not checked: the caller knows the size of each tensor type.
    """
    return _mapped(Path(path), lambda reader: reader.read())


def read_gguf_metadata(path: str | Path, prefixes: tuple[str, ...]) -> bytes:
    """Return the bytes of a GGUF file with no weights and only the metadata whose keys begin with these prefixes.

    Raises InputError as `read_gguf_header` does.
    """
    return _mapped(Path(path), lambda reader: reader.without_weights(prefixes))


def _mapped(path: Path, use: "Callable[[_HeaderReader], _T]") -> _T:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return use(_HeaderReader(data, path))
    except ValueError as error:  # an empty file cannot be mapped
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a GGUF file: it is empty") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


class _HeaderReader:
    def __init__(self, data: mmap.mmap, path: Path):
        self._data, self._path = data, path
        self._order: Literal["<", ">"] = "<"
        self._at = len(_MAGIC)

    def read(self) -> Header:
        _, tensors, pairs = self._counts()
        metadata = {key: value for key, value, _ in self._pairs(pairs)}
        table = [self._tensor() for _ in range(tensors)]
        placed = self._placed(table, metadata.get("general.alignment", 32))
        return Header(metadata, placed, big_endian=self._order == ">")

    def without_weights(self, prefixes: tuple[str, ...]) -> bytes:
        version, _, pairs = self._counts()
        kept = [self._data[span] for key, _, span in self._pairs(pairs) if key.startswith(prefixes)]
        return _MAGIC + struct.pack(f"{self._order}IQQ", version, 0, len(kept)) + b"".join(kept)

    def _counts(self) -> tuple[int, int, int]:
        """Read the version, the number of tensors and the number of metadata entries."""
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise InputError(f"{self._path} is not a GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # a small number in the other byte order
            self._order, self._at = ">", len(_MAGIC)
            version = self._number("I")
        if version not in (2, 3):
            raise InputError(f"{self._path} is GGUF version {version}; only 2 and 3 are supported; convert it again")
        return version, self._number("Q"), self._number("Q")

    def _pairs(self, count: int) -> Iterator[tuple[str, Any, slice]]:
        """Yield each key, its value and the slice of the file that holds both."""
        for _ in range(count):
            start = self._at
            key = self._string()
            value = self._value(self._number("I"))
            yield key, value, slice(start, self._at)

    def _tensor(self) -> tuple[str, StoredTensor]:
        """Read one entry of the table of tensors; its offset is relative to the beginning of the weights."""
        name, axes = self._string(), self._number("I")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        return name, StoredTensor(shape, self._number("I"), self._number("Q"))

    def _placed(self, table: list[tuple[str, StoredTensor]], alignment: Any) -> dict[str, StoredTensor]:
        """Return the tensors by name, with offsets in the file: weights begin at the next multiple of the alignment."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{self._path} is damaged: general.alignment={alignment!r} is not a power of two")
        start = -(-self._at // alignment) * alignment
        tensors = {name: dataclasses.replace(tensor, start=start + tensor.start) for name, tensor in table}
        if len(tensors) != len(table):
            raise InputError(f"{self._path} is damaged: two of its tensors have the same name")
        return tensors

    def _take(self, size: int) -> int:
        """Move past the next `size` bytes and return the offset of the first."""
        start = self._at
        if size > len(self._data) - start:
            raise InputError(f"{self._path} ends within its metadata at byte {len(self._data)}; fetch it again")
        self._at += size
        return start

    def _number(self, kind: str) -> Any:
        layout = self._order + kind
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        size = self._number("Q")
        start = self._take(size)
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path} is damaged: the string at byte {start} is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        raise InputError(f"{self._path} is damaged: value type {kind} at byte {self._at} is unknown")

    def _array(self) -> Any:
        kind, count = self._number("I"), self._number("Q")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind]).newbyteorder(self._order)
            start = self._take(count * dtype.itemsize)
            return np.frombuffer(self._data[start : self._at], dtype).astype(dtype.newbyteorder("="))
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        raise InputError(f"{self._path} is damaged: an array of value type {kind} at byte {self._at} is unknown")

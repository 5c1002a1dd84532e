"""Safetensors files of a model: read tensor by tensor, write in shards."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from model.errors import InputError

logger = logging.getLogger("isoflop")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9
_READ = ("F64", "F32", "F16", "BF16")


def read_json(file: Path) -> dict:
    """Return the object in a JSON file. Raises InputError if the file is missing, damaged or has no object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} has no {file.name}; give a folder with a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


class TensorFolder:
    """Tensors by name, from model.safetensors or else from the shards of an index.

    An index next to model.safetensors is ignored with a warning, as in Transformers. Files are read, not memory-mapped,
    so that one tensor at a time is in memory. Raises InputError for a folder without such files, for files that are
    truncated or not safetensors, and for an index that does not match its files.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        if (folder / SINGLE).is_file():
            _warn_of_index(folder)
            self._read_header(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._read_index(folder)
        else:
            raise _no_safetensors(folder)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Return a copy of one tensor, in the dtype of the file."""
        _check_dtype(name, self._files[name], self._dtypes[name])
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def _read_index(self, folder: Path) -> None:
        where = _weight_map(folder)
        files = sorted(set(where.values()))
        for name in files:
            if Path(name).name != name:
                raise InputError(f"{folder / INDEX} names {name!r}, which is not a file of its folder")
        missing = [name for name in files if not _is_file(folder / name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"{folder / INDEX} names {missing[0]!r}{more}, which is not there; download it too")
        for name in files:
            self._read_header(folder / name)
        for name, file in where.items():
            if name not in self._files or self._files[name].name != file:
                raise InputError(f"{folder / INDEX} says that {file} holds the tensor {name}, but it does not")

    def _read_header(self, file: Path) -> None:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                if name in self._files:
                    raise InputError(
                        f"both {self._files[name]} and {file.name} hold the tensor {name}; "
                        "keep the files of one model in the folder"
                    )
                part = tensors.get_slice(name)
                self._files[name] = file
                self.shapes[name], self._dtypes[name] = tuple(part.get_shape()), part.get_dtype()


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a file by name, in the dtype of the file. Raises InputError like `TensorFolder`."""
    with _open(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dict
            _check_dtype(name, file, tensors.get_slice(name).get_dtype())
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _check_dtype(name: str, file: Path, dtype: str) -> None:
    if dtype not in _READ:
        raise InputError(f"the tensor {name} in {file} is stored as {dtype}; isoflop reads {', '.join(_READ)}")


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a file and check its header; errors of the library, in the `with` block too, become InputError."""
    import safetensors

    try:
        with safetensors.safe_open(str(file), framework="np", backend="pread") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut off or not a safetensors file: {error}") from None


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # such as a name that is too long
        return False


def _weight_map(folder: Path) -> dict[str, str]:
    """Return {tensor: file} of an index."""
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from tensor names to file names")
    return where


def _warn_of_index(folder: Path) -> None:
    """Warn that the index is ignored, unless it names nothing but model.safetensors."""
    if not (folder / INDEX).is_file():
        return
    try:
        others = set(_weight_map(folder).values()) != {SINGLE}
    except InputError:
        others = True
    if others:
        logger.warning("%s is read, as Transformers does; %s in the same folder is ignored", folder / SINGLE, INDEX)


def _no_safetensors(folder: Path) -> InputError:
    """Return an error that names the weights that the folder has instead."""
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf:
        return InputError(f"{folder} has neither {SINGLE} nor {INDEX}, but {gguf[0]}; give the path of that file")
    shards = sorted(file.name for file in folder.glob("model-*.safetensors"))
    if shards:
        return InputError(f"{folder} has {shards[0]}, but no {INDEX}, which lists the shards; download it too")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}, only {', '.join(others)}; isoflop reads models under the "
            "file names of Transformers' save_pretrained(folder)"
        )
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(suffix))
    if pickles:
        return InputError(
            f"{folder} has weights only as {pickles[0]}, a pickle, which is not read because it can run any code; load "
            "it with Transformers and save it again with save_pretrained(folder)"
        )
    return InputError(f"{folder} has neither {SINGLE} nor {INDEX}")


def write_tensors(
    folder: Path,
    sizes: Iterable[tuple[str, int]],
    tensor: Callable[[str], Shaped[np.ndarray, "..."]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in shards of at most `shard_bytes`, or of one tensor.

    sizes: (name, bytes) in the order of the files. tensor: returns the tensor of a name when its shard is written.
    """
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    total = filled = 0
    for name, size in sizes:
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Safetensors files of one model: reading tensor by tensor, writing in shards."""

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
    """An object from a JSON file. Raises InputError where there is none."""
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
    """The tensors of model.safetensors or, where there is none, of the shards that an index names, by their names.

    An index beside model.safetensors is ignored, as Transformers does, and a warning says so. Files are read and not
    mapped, so that no more of them is in memory than the one tensor. Raises InputError on a folder without such files,
    on a file that is cut off or no safetensors file, and on an index that does not agree with its files.
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
            _refuse(folder)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A copy of one tensor, in the precision of the file."""
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
    """Return all tensors of a file by name, in the precision of the file. Raises InputError as `TensorFolder` does."""
    with _open(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dict
            _check_dtype(name, file, tensors.get_slice(name).get_dtype())
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _check_dtype(name: str, file: Path, dtype: str) -> None:
    if dtype not in _READ:
        raise InputError(f"the tensor {name} in {file} is stored as {dtype}; isoflop reads {', '.join(_READ)}")


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Its header is checked at once; whatever is wrong with what is read from it is an InputError too."""
    import safetensors

    try:
        with safetensors.safe_open(str(file), framework="np", backend="pread") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} is cut off or not a safetensors file: {error}") from None


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that no file can have
        return False


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, as the index says."""
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from tensor names to file names")
    return where


def _warn_of_index(folder: Path) -> None:
    """Say that the index is ignored, unless it names model.safetensors and nothing else."""
    if not (folder / INDEX).is_file():
        return
    try:
        others = set(_weight_map(folder).values()) != {SINGLE}
    except InputError:
        others = True
    if others:
        logger.warning("%s is read, as Transformers does; %s beside it is ignored", folder / SINGLE, INDEX)


def _refuse(folder: Path) -> None:
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf:
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}, but {gguf[0]}; give the path of that file")
    shards = sorted(file.name for file in folder.glob("model-*.safetensors"))
    if shards:
        raise InputError(f"{folder} holds {shards[0]}, but no {INDEX} to say which shards there are; download it too")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}, only {', '.join(others)}; isoflop reads models under the "
            "names that Transformers' save_pretrained(folder) gives them"
        )
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(suffix))
    if pickles:
        raise InputError(
            f"{folder} holds weights only as {pickles[0]}, a pickle, which can run any program when it is read and so "
            "is not read; load it with Transformers and save it again with save_pretrained(folder)"
        )
    raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}")


def write_tensors(
    folder: Path,
    sizes: Iterable[tuple[str, int]],
    tensor: Callable[[str], Shaped[np.ndarray, "..."]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in the order of `sizes` (names and bytes), each made by `tensor` when its shard is written."""
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

"""GGUF models in one or several files, as split by llama.cpp's `gguf-split`, and folders with GGUF files."""

import re
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.gguf_header import Header, read_gguf_header

TOKENIZER_NAME = "tokenizer.gguf"  # metadata only, not a model
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_gguf_parts(path: str | Path) -> list[tuple[Path, Header]]:
    """Return [(path, header)] of a GGUF file, or of all parts of the model that the file is a part of, in order.

    The metadata of the first part are those of the model. Raises InputError if a part is missing, if names and metadata
    contradict each other, or if two parts hold the same tensor.
    """
    path = Path(path)
    header = read_gguf_header(path)
    count = _whole_number(path, header.metadata, "split.count", 1)
    if count <= 1:
        return [(path, header)]
    files = _files_of(path, count)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path} is one of the {count} parts of a model; missing in its folder: {', '.join(missing)}; "
            "download the missing parts"
        )
    parts = [(file, header if file.name == path.name else read_gguf_header(file)) for file in files]
    holders: dict[str, Path] = {}
    for number, (file, part) in enumerate(parts):
        found = [_whole_number(file, part.metadata, key, 0) for key in ("split.no", "split.count")]
        if found != [number, count]:
            raise InputError(
                f"{file} says that it is part {found[0] + 1} of {found[1]}, but its name says {number + 1} of {count}; "
                "rename the files as they were"
            )
        for name in part.tensors:
            if name in holders:
                raise InputError(f"both {holders[name]} and {file.name} hold the tensor {name}; fetch the parts again")
            holders[name] = file
    total = _whole_number(path, parts[0][1].metadata, "split.tensors.count", len(holders))
    if total != len(holders):
        raise InputError(f"the parts of {path} hold {len(holders)} tensors, but should hold {total}; fetch them again")
    return parts


def read_first_part(path: Path) -> tuple[Path, Header]:
    """Return (path, header) of the file that holds the metadata of a model: the given file, or the first part."""
    header = read_gguf_header(path)
    number, count = (_whole_number(path, header.metadata, key, 0) for key in ("split.no", "split.count"))
    if number == 0:
        return path, header
    first = _files_of(path, count)[0]
    if not first.is_file():
        raise InputError(f"{path} is one of the {count} parts of a model, and {first.name} is not in the same folder")
    return first, read_gguf_header(first)


def find_gguf(folder: Path) -> Path | None:
    """Return the GGUF model of a folder, for a model in parts the first file present, or None.

    Image encoders (`mmproj*`) and a stored tokenizer (`tokenizer.gguf`) do not count. Raises InputError, listing them,
    where there are several models.
    """
    models: dict[str, Path] = {}
    for file in sorted(set(folder.glob("*.gguf")) - {*folder.glob("mmproj*"), folder / TOKENIZER_NAME}):
        match = _PART.fullmatch(file.name)
        models.setdefault(match[1] if match else file.name, file)
    if len(models) > 1:
        names = ", ".join(file.name for file in models.values())
        raise InputError(f"the folder {folder} holds several GGUF models: {names}; give the path of one of them")
    return next(iter(models.values()), None)


def _files_of(path: Path, count: int) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{path} is one of the {count} parts of a model, whose names must end as -00001-of-{count:05d}.gguf does; "
            "rename the files as they were"
        )
    return [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _whole_number(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000:
        raise InputError(f"{path} is damaged: {key}={value!r} must be a whole number below 100,000")
    return value

"""Models that are several GGUF files, cut as llama.cpp's `gguf-split` does, and folders with GGUF files."""

import re
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.gguf_header import Header, read_gguf_header

TOKENIZER_NAME = "tokenizer.gguf"  # a file of metadata alone, which is no model
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_gguf_parts(path: str | Path) -> list[tuple[Path, Header]]:
    """Read the header of a GGUF file or, of a file that is a part of a model, those of all its parts in their order.

    The first part's metadata are the model's. Raises InputError where a part is missing, where names and metadata
    contradict each other, and where two parts hold one tensor.
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
            f"{path} is one of the {count} parts of a model, and {', '.join(missing)} is not beside it; fetch that too"
        )
    parts = [(file, header if file.name == path.name else read_gguf_header(file)) for file in files]
    holders: dict[str, Path] = {}
    for number, (file, part) in enumerate(parts):
        found = [_whole_number(file, part.metadata, key, 0) for key in ("split.no", "split.count")]
        if found != [number, count]:
            raise InputError(
                f"{file} says that it is part {found[0] + 1} of {found[1]}, but its name says {number + 1} of {count}; "
                "give files their names back"
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
    """Read the header that holds the metadata of the model that a GGUF file is, or is a part of."""
    header = read_gguf_header(path)
    number, count = (_whole_number(path, header.metadata, key, 0) for key in ("split.no", "split.count"))
    if number == 0:
        return path, header
    first = _files_of(path, count)[0]
    if not first.is_file():
        raise InputError(f"{path} is one of the {count} parts of a model, and {first.name} is not beside it")
    return first, read_gguf_header(first)


def find_gguf(folder: Path) -> Path | None:
    """Return the one GGUF model of a folder, of a model in parts the first file that is there; None: there is none.

    Neither what sees images for a model nor a stored tokenizer (`tokenizer.gguf`) is one.
    Raises InputError, listing them, where there are several.
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
            "give files their names back"
        )
    return [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _whole_number(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000:
        raise InputError(f"{path} is damaged: {key}={value!r} must be a whole number below 100,000")
    return value

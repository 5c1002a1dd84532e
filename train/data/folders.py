"""Data folders of a run, by the names that mixtures use."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from model.errors import InputError
from model.runs import data_of as data_of
from train.data.shards import TokenShards


@dataclasses.dataclass(frozen=True)
class Data:
    """Sources of a run's tokens, by name. The first source also provides the validation split."""

    folders: dict[str, str]
    sources: dict[str, TokenShards]

    @classmethod
    def open(cls, data: str | Path | Mapping[str, str | Path]) -> "Data":
        """Open a prepared folder, or several by name. Raises InputError if there is none."""
        given = data if isinstance(data, Mapping) else {"data": data}
        if not given:
            raise InputError("a run needs at least one source of data")
        folders = {name: str(Path(folder).resolve()) for name, folder in given.items()}
        return cls(folders, {name: TokenShards(folder, "train") for name, folder in folders.items()})

    @property
    def first(self) -> str:
        """The folder of the first source."""
        return next(iter(self.folders.values()))

    @property
    def hash(self) -> str | dict[str, str]:
        """Hash of the content (one source), or hashes by name (several); independent of the folders' paths."""
        hashes = {name: shards.manifest.hash for name, shards in self.sources.items()}
        return hashes if len(hashes) > 1 else next(iter(hashes.values()))

    @property
    def place(self) -> str | dict[str, str]:
        """Absolute path (one source), or paths by name (several), as the run's record stores them."""
        return self.folders if len(self.folders) > 1 else self.first

    def beside(self, run: Path) -> str | dict[str, str]:
        """Return `place` relative to the run's folder, to find the data again after both were moved together."""
        found = {name: os.path.relpath(folder, run.resolve()) for name, folder in self.folders.items()}
        return found if len(found) > 1 else next(iter(found.values()))

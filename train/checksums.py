"""Write JSON documents that hold a checksum of their own fields; `model.records` reads and verifies them."""

from pathlib import Path
from typing import Any

from model.records import CHECKSUMS as CHECKSUMS
from model.records import checksums as checksums
from model.records import json_text, seal
from model.records import read_intact as read_intact
from model.records import read_sealed as read_sealed
from model.records import verify as verify
from train.files import write_atomically


def write_sealed(path: Path, document: dict[str, Any], besides: tuple[str, ...] = ()) -> None:
    """Write a JSON document atomically, with a checksum of all its fields except those named in `besides`."""
    write_atomically(path, json_text(document | {"checksum": seal(document, besides)}))

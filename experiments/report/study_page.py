"""The study's report."""

from pathlib import Path
from typing import Any


def write_study_page(folder: Path, document: dict[str, Any]) -> None:
    """Write `report.html`."""
    (folder / "report.html").write_text("<p>stub</p>")

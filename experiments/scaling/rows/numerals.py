"""Parse numbers as people and programs write them: 1.3B, 1,300,000, 3,51, 124 million, n/a."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import InputError

MULTIPLES = {
    **dict.fromkeys(("k", "thousand", "thousands"), 1e3),
    **dict.fromkeys(("m", "mn", "million", "millions"), 1e6),
    **dict.fromkeys(("b", "bn", "billion", "billions"), 1e9),
    **dict.fromkeys(("t", "tn", "trillion", "trillions"), 1e12),
}
"""Suffixes of a count, in upper or lower case."""
MISSING = {"", "-", "–", "—", ".", "na", "n/a", "#n/a", "nan", "null", "none", "nil"}
_GROUPS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?(?:e[-+]?\d+)?", re.IGNORECASE)  # 1,300,000.5
_COMMA = re.compile(r"[-+]?\d*(?:,\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)  # 3,51
_COMMA_GROUPS = re.compile(r"[-+]?\d{1,3}(?:\.\d{3})+(?:,\d*)?")  # 1.300.000,5
_SPACES = re.compile(r"(?<=\d)[\s'’](?=\d{3}(?!\d))")  # 1 300 000 and 1'300'000
_UNIT = re.compile(r"\s*([a-z]+)$", re.IGNORECASE)
_HEADER_UNIT = re.compile(
    r"(?:[\s_]*[(\[]\s*(?:in\s+)?([a-z]+)\s*[)\]]|(?:[\s_]in)?[\s_]+([a-z]+s))\s*$", re.IGNORECASE
)

Records = Sequence[tuple[int, Mapping[str, Any]]]


def unit_of(column: str) -> tuple[str, float]:
    """Return a column's name and unit: ("params", 1e6) for "params (M)" or "params in millions"."""
    match = _HEADER_UNIT.search(column)
    unit = MULTIPLES.get((match[1] or match[2]).lower()) if match else None
    return (column, 1.0) if match is None or unit is None else (column[: match.start()], unit)


def read_numbers(path: Path, records: Records, columns: Mapping[str, bool]) -> tuple[dict[str, list[float]], list[str]]:
    """Return ({column: numbers}, assumptions as text) of named columns; columns: whether each holds counts.

    NaN replaces cells that are empty or marked as missing; such rows are dropped later. Counts may be written as 70M,
    1.4T or 124 million, and a column named "tokens (B)" is of billions. Commas are decimal points or separate
    thousands: the cells of all columns decide together, by those that can be read in one way only. Raises `InputError`
    for a cell that is no number, and for cells that contradict each other.
    """
    decimal_comma = _decimal_comma(path, records, columns)
    notes = []
    if decimal_comma is not None:
        place, title, example = decimal_comma
        notes.append(f"commas are taken for decimal points, as in {example!r} (row {place}, column {title!r})")
    found: dict[str, list[float]] = {}
    for name, count in columns.items():
        unit = unit_of(name)[1] if count else 1.0
        if unit > 1:
            notes.append(f"column {name!r} is taken in units of {unit:,.0f}")
        found[name] = []
        for row, record in records:
            cell: Any = record.get(name)
            own = isinstance(cell, str) and _split_unit(cell.strip())[0] > 1  # "124M" in a column of millions
            value = number(path, row, name, cell, count=count, decimal_comma=decimal_comma is not None)
            found[name].append(value if own else unit * value)
    return found, notes


def number(path: Path, row: int, name: str, value: Any, *, count: bool = False, decimal_comma: bool = False) -> float:
    """Return one cell's number, NaN if it is missing. Raises `InputError` for other text."""
    if value is None:
        return math.nan
    place = f"{path}, row {row}: column {name!r}"
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in MISSING:
            return math.nan
        if text.endswith("%"):
            raise InputError(
                f"{place} holds {value!r}: write a number in the column's own unit, without a per cent sign"
            )
        unit, text = _split_unit(text) if count else (1.0, text)
        try:
            return unit * float(_plain(text, decimal_comma))
        except ValueError:
            pass
        if "," in text:
            raise InputError(f"{place} holds {value!r}: write 1300000 or 1,300,000 for a count and 1.5 for a fraction")
    elif not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    example = ", such as 1.3B or 1300000000" if count else ", such as 3.25"
    raise InputError(f"{place} should be a number{example}, but holds {value!r}")


def _split_unit(text: str) -> tuple[float, str]:
    """Return (1e9, "1.3") of "1.3B"; exponents are no units."""
    match = _UNIT.search(text)
    unit = MULTIPLES.get(match[1].lower()) if match else None
    return (1.0, text) if match is None or unit is None else (unit, text[: match.start()])


def _plain(text: str, decimal_comma: bool) -> str:
    """Return a numeral as Python reads it."""
    text = _SPACES.sub("", text)
    if decimal_comma:
        return text.replace(".", "").replace(",", ".") if "," in text or _COMMA_GROUPS.fullmatch(text) else text
    return text.replace(",", "") if _GROUPS.fullmatch(text) else text


def _decimal_comma(path: Path, records: Records, columns: Mapping[str, bool]) -> tuple[int, str, str] | None:
    """Return (row, column, cell) of the first cell whose comma must be a decimal point; None if commas are none.

    "1,300,000" and "3.5" have decimal points only, "3,51" and "1.300.000" decimal commas only. "1,300" is either: of a
    loss it is 1.3 and of a count 1300, unless other cells say that it is a decimal comma.
    """
    comma = point = None
    for name, count in columns.items():
        for row, record in records:
            cell = record.get(name)
            if not isinstance(cell, str) or ("," not in cell and "." not in cell):
                continue
            text = _SPACES.sub("", (_split_unit(cell.strip())[1] if count else cell.strip()))
            thousands = _GROUPS.fullmatch(text) is not None
            if "," in text:
                decimal = _COMMA.fullmatch(text) is not None or _COMMA_GROUPS.fullmatch(text) is not None
                either = thousands and decimal
                if decimal and not (either and count):
                    comma = comma or (row, name, cell)
                elif thousands and not either:
                    point = point or (row, name, cell)
            elif text.count(".") > 1 and _COMMA_GROUPS.fullmatch(text):
                comma = comma or (row, name, cell)
            elif not (count and _COMMA_GROUPS.fullmatch(text)):
                point = point or (row, name, cell)
    if comma is not None and point is not None:
        raise InputError(
            f"{path} has decimal commas ({comma[2]!r} in row {comma[0]}, column {comma[1]!r}) and decimal points "
            f"({point[2]!r} in row {point[0]}, column {point[1]!r}); write one kind"
        )
    return comma

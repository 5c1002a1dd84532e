"""Write parts of messages: numbers with their nouns and units, and warnings on stderr."""

import sys


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun, as in "1 run", "2 runs", "12,000 runs" or "1 degree of freedom".

    many: the plural, by default with an s added to the first word of a phrase with "of", else to the last word.
    """
    if number == 1:
        return f"1 {one}"
    if many is None:
        head, of, rest = one.partition(" of ")
        many = f"{head}s{of}{rest}"
    return f"{number:,} {many}"


def is_or_are(number: int) -> str:
    """Return "is" or "are" for this number."""
    return "is" if number == 1 else "are"


def say(sentence: str) -> None:
    """Print a warning on stderr, such as that a command does something other than requested."""
    print(f"isoflop: {sentence}", file=sys.stderr)


def count_in_words(count: float) -> str:
    """Write a count with three digits: 6.74B."""
    return _in_units(count, 1000, ("", "k", "M", "B", "T"))


def bytes_in_words(size: float) -> str:
    """Write a size with three digits: 1.25 GiB."""
    return _in_units(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _in_units(value: float, base: int, units: tuple[str, ...]) -> str:
    index = 0
    while value >= base - 0.5 and index + 1 < len(units):
        value, index = value / base, index + 1
    decimals = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{units[index]}"


def hours_in_words(hours: float | None) -> str:
    """Write hours in a readable unit: 52 s, 12 min, 3.4 h; a dash for None."""
    if hours is None:
        return "–"
    seconds = 3600 * hours
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if hours < 2 else f"{hours:.1f} h"

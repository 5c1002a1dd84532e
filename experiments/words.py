"""Numbers and nouns in messages: one helper, so that one run is never "1 runs"."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """The number with its noun, as in "1 run", "2 runs", "12,000 runs" or "1 degree of freedom".

    many: the plural, by default with an s added to the first word of a phrase with "of", else to the last word.
    """
    if number == 1:
        return f"1 {one}"
    if many is None:
        head, of, rest = one.partition(" of ")
        many = f"{head}s{of}{rest}"
    return f"{number:,} {many}"


def is_or_are(number: int) -> str:
    """The verb that goes with so many."""
    return "is" if number == 1 else "are"

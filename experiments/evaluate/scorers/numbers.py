"""Find the number that a worked solution ends with, as for GSM8K (Cobbe et al. 2021)."""

import re

STRICT = re.compile(r"#### (-?[0-9.,]+)")
STRICT_SENTENCE = re.compile(r"[Tt]he answer is (-?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = re.compile(r"[,$]|\.$")


def strict_number(output: str, pattern: re.Pattern[str] = STRICT) -> str | None:
    """Return the first number in the required form, "#### 18" or "The answer is 18"; None if there is none."""
    found = pattern.search(output)
    return None if found is None else plain_number(found.group(1))


def flexible_number(output: str) -> str | None:
    """Return the last number in the text, in whatever form; None if there is none."""
    found = _ANY_NUMBER.findall(output)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """Return the number without commas, dollar signs and a full stop at its end: "$1,200." becomes "1200".

    The text is compared, not the value, as in lm-evaluation-harness: "18.00" is not "18".
    """
    return _IGNORED.sub("", text.strip())

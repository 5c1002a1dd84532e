"""Compare the machine's own speed in two documents, to tell a change of the code from one of the machine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LIMIT = 1.1  # relative difference of ceilings from which the machine counts as changed
_CEILINGS = {"read_bytes_per_second": "read bandwidth", "matmul_flops_per_second": "product rate"}


@dataclass(frozen=True)
class CeilingChange:
    """One ceiling of the machine in two documents."""

    ceiling: str
    before: float
    after: float
    ratio: float
    """After over before."""
    times: list[float]
    """[smallest, largest] factor on a time that the machine alone explains, over all measurements of that ceiling; the
    range always contains 1."""
    changed: bool
    """True if the ceilings differ by more than LIMIT."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def compare_ceilings(before: dict[str, Any], after: dict[str, Any]) -> list[CeilingChange]:
    """Return the change of every ceiling that both documents have."""
    pair = [document.get("ceilings") or {} for document in (before, after)]
    found = []
    for name, words in _CEILINGS.items():
        is_same = name != "matmul_flops_per_second" or len({one.get("matmul_dtype") for one in pair}) == 1
        if not all(name in one for one in pair) or not is_same:
            continue
        measured = [one.get(f"{name}_measured") or [one[name]] for one in pair]
        ratio = pair[1][name] / pair[0][name]
        found.append(
            CeilingChange(
                ceiling=words,
                before=pair[0][name],
                after=pair[1][name],
                ratio=ratio,
                times=[
                    min(1.0, min(measured[0]) / max(measured[1])),
                    max(1.0, max(measured[0]) / min(measured[1])),
                ],
                changed=max(ratio, 1 / ratio) > LIMIT,
            )
        )
    return found


def has_changed(ceilings: Sequence[CeilingChange]) -> bool:
    """Return whether any ceiling differs by more than LIMIT between the documents."""
    return any(row.changed for row in ceilings)


def times_of(ceilings: Sequence[CeilingChange]) -> list[float]:
    """Return the smallest and largest factor on a time that the machine alone explains, over all ceilings."""
    return [
        min((row.times[0] for row in ceilings), default=1.0),
        max((row.times[1] for row in ceilings), default=1.0),
    ]


def per_ceiling(ratio: float, metric: str, bound: str | None, ceilings: Sequence[CeilingChange]) -> float | None:
    """Return the ratio of times normalised by the ceiling that binds: what it would be on one machine.

    A prefill and a training step are bound by the product rate. None if that ceiling is not known.
    """
    computes = bound == "compute" or metric in ("time_to_first_token_seconds", "step_seconds")
    wanted = "product rate" if computes else "read bandwidth" if bound == "memory" else None
    return next((ratio * row.ratio for row in ceilings if row.ceiling == wanted), None)


def in_words(ceilings: Sequence[CeilingChange]) -> str:
    """Describe the change: read bandwidth 41.2 → 15.3 (0.37 times), product rate 190 → 171 (0.90 times), in 1e9/s."""
    return ", ".join(
        f"{row.ceiling} {row.before / 1e9:.3g} → {row.after / 1e9:.3g} ({row.ratio:.2f} times)" for row in ceilings
    )

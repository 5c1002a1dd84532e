"""Find the columns of a table and read the numbers in them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.scaling.rows.numerals import unit_of
from model.errors import InputError

MOST_LISTED = 20  # columns of a table in a message
ALIASES = {
    "params": ("params", "n", "n_params", "num_params", "model_size", "parameters", "num_parameters", "total_params"),
    "tokens": (
        "tokens",
        "d",
        "n_tokens",
        "num_tokens",
        "training_tokens",
        "train_tokens",
        "total_tokens",
        "tokens_seen",
    ),
    "loss": ("loss", "val_loss", "validation_loss", "final_loss", "eval_loss", "valid_loss", "test_loss"),
    "flops": ("flops", "c", "compute", "training_flops", "training_flop"),
}
"""Names that others give to our columns, compared without case and unit, with spaces, dots, dashes and slashes as
underscores, and without the config. and summary. of Weights & Biases."""


def find_column(
    path: Path, role: str, wanted: str, present: Sequence[str], aliases: Mapping[str, Sequence[str]] = ALIASES
) -> str:
    """Return the column for a role of `aliases`: the given name, or if the default name is absent, its alias.

    An absent given name is returned unchanged; `require` raises for it. Raises `InputError` if several aliases are
    present.
    """
    if wanted in present or wanted != role:
        return wanted
    found = [column for column in present if _plain(column) in aliases.get(role, ())]
    if len(found) > 1:
        raise InputError(
            f"{path} has no column {role!r}, and {' as well as '.join(map(repr, found))} could be it; "
            f"name one with --columns.{role}"
        )
    return found[0] if found else wanted


def require(path: Path, names: Iterable[str], present: Sequence[str]) -> None:
    """Raise `InputError` for columns that the table lacks, with those it has and the closest of them."""
    import difflib

    missing = [name for name in names if name not in present]
    if not missing:
        return
    hints = []
    taken = {alias for role, aliases in ALIASES.items() if role not in missing for alias in aliases}
    lowered = {column.lower(): column for column in present if _plain(column) not in taken}
    for name in missing:
        close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
        hints += [f"{lowered[match]!r} for {name!r}" for match in close]
    hint = f"; close names: {', '.join(hints)}" if hints else ""
    plain = {_plain(column) for column in present}
    chart = next((column for column in present if column.endswith(("__MIN", "__MAX"))), None)
    if chart is not None and not plain & {*ALIASES["params"], *ALIASES["tokens"]}:
        raise InputError(
            f"{path} is a chart's export, with a column of losses per run such as {chart[:-5]!r}; a fit needs one "
            "row per run: export the table of runs, with columns of parameters, tokens and the final validation loss"
        )
    if "tokens" in missing and plain & set(ALIASES["flops"]):
        hint += "; tokens are not worked out from FLOPs: add a column with D = C/(6·N) if that is what C means"
    training = next((column for column in present if _plain(column) in {"train_loss", "training_loss"}), None)
    if "loss" in missing and training is not None:
        hint += f"; {training!r} is a training loss: if nothing else is there, name it with --loss"
    if "loss" in missing and plain & {"perplexity", "ppl", "bpb", "bits_per_byte"}:
        hint += "; a loss is in nats per token, such as the logarithm of the perplexity"
    more = f" and {len(present) - MOST_LISTED} more" if len(present) > MOST_LISTED else ""
    raise InputError(
        f"{path} has no column {' or '.join(repr(name) for name in missing)}; "
        f"its columns are {', '.join(map(repr, present[:MOST_LISTED]))}{more}{hint}"
    )


def truth(path: Path, row: int, name: str, value: Any) -> bool:
    """Parse a boolean in any usual spelling; empty is False."""
    if value is None:
        return False
    text = str(value).strip().lower()
    if text in {"true", "1", "1.0", "yes", "y"}:
        return True
    if text in {"false", "0", "0.0", "no", "n", "", "nan", "none"}:
        return False
    raise InputError(f"{path}, row {row}: column {name!r} should be true or false but holds {value!r}")


def _plain(column: str) -> str:
    name = re.sub(r"^(config|summary)[./]|[./]value$", "", unit_of(column)[0].strip(), flags=re.IGNORECASE)
    return re.sub(r"[\s.\-/]+", "_", name).strip("_").lower()

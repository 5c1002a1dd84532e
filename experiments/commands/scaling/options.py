"""Define the options of commands that read a table of runs: which column is which, as `--columns.params COLUMN`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from experiments.scaling.rows.table import Table

Column = Annotated[str, tyro.conf.arg(metavar="COLUMN")]
OptionalColumn = Annotated[str | None, tyro.conf.arg(metavar="COLUMN")]
_ONLY_BY_NAME = {"unique_tokens": "the laws of repeated data", "active_params": "the law of experts"}


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """Names of the table's columns; by default columns are found by their usual names."""

    params: Column = "params"
    """Model sizes N, in parameters."""
    tokens: Column = "tokens"
    """Training tokens D."""
    loss: Column = "loss"
    """Final validation losses, in nats per token."""
    flops: OptionalColumn = None
    """Training FLOPs that group runs into budgets; by default 6·N·D, grouped within 5 %."""
    unique_tokens: OptionalColumn = None
    """Tokens before the first repeat, for the laws of repeated data."""
    active_params: OptionalColumn = None
    """Parameters that one token uses, for the law of experts; params then counts all of them."""
    keep_repeated: bool = False
    """Keep rows whose column `repeated` is true (data seen more than once)."""

    def read(self, path: Path, *, keep_held_out: bool = False) -> "Table":
        """Return the table, or a study folder's runs.csv.

        A column found under a name other than the default is reported on stderr.
        """
        from experiments.scaling.rows.table import read_header, read_table
        from experiments.scaling.study.run import table_troubles
        from model.errors import InputError

        if path.is_dir():
            if not (path / "runs.csv").is_file():
                raise InputError(f"{path} is a folder without runs.csv: name a table, or a folder of `scaling run`")
            for trouble in table_troubles(path):
                print(f"warning: {trouble}", file=sys.stderr)
            path = path / "runs.csv"
        names = dataclasses.asdict(self)
        table = read_table(path, **names, keep_held_out=keep_held_out)
        stand_ins = [(role, column) for role, column in table.columns.items() if column != names[role]]
        if stand_ins:
            found = ", ".join(f"{column!r} for {role}" for role, column in stand_ins)
            print(f"{path}: taking the column {found}", file=sys.stderr)
        for note in table.notes:
            print(f"{path}: {note}", file=sys.stderr)
        present = read_header(path)
        for role, laws in _ONLY_BY_NAME.items():
            if names[role] is None and role in present:
                command = f"isoflop scaling fit {path} --columns.{role.replace('_', '-')} {role}"
                print(f"{path}: the column {role!r} is not used; for {laws}: `{command}`", file=sys.stderr)
        return table


BY_NAME = TableOptions()
"""Every column by its usual name: the default of a command."""
Columns = Annotated[TableOptions, tyro.conf.arg(name="columns")]
"""The flags as --columns.params COLUMN, since --params is the size of a planned run."""

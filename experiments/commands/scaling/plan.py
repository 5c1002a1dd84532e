"""`isoflop scaling plan`: the runs of a scaling study and what they cost, before any is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.commands.options import JsonFile
from experiments.words import counted

if TYPE_CHECKING:
    from experiments.scaling.study.design import Design

Definition = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESIGN.toml")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


def plan(
    design: Definition,
    *,
    data: Folder,
    budgets: tuple[float, ...] = (),
    hours: float | None = None,
    branches: bool | None = None,
    probe: bool = True,
    json: JsonFile = None,
) -> None:
    """Lay out the sizes and token counts of a scaling study around the expected optimum, with what every run costs.

    Nothing is trained but a few steps on random tokens, which say how fast this machine is. Nothing is written.

    Example: isoflop scaling plan experiments/configs/sotu_ladder.toml --data data/sotu --hours 0.5

    Args:
        design: The study's definition (see `experiments/scaling/study/design.py` for its keys).
        data: A folder made by `isoflop data prepare`.
        budgets: FLOPs (6·N·D) of one run of each budget, instead of the definition's budgets or hours.
        hours: Hours of training on this machine, for all runs together, instead of the definition's budgets or hours.
        branches: Whether runs of one size leave one trunk and cool down, instead of what the definition says.
        probe: Time the training step of the smallest and the largest model; --no-probe does not, and says no hours.
        json: Also write the plan to this file.
    """
    from experiments.commands.options import write_document
    from experiments.scaling.study.cost import plan_study

    asked = read_design(design, budgets=budgets, hours=hours, branches=branches)
    document = plan_study(asked, data, probe=probe).document()
    write_document(json, document)
    show_plan(document)


def read_design(
    path: Path, *, budgets: tuple[float, ...] = (), hours: float | None = None, branches: bool | None = None
) -> "Design":
    """The design of a file, with what the command line says instead. Raises InputError."""
    from experiments.scaling.study.design import Design
    from model.errors import InputError

    design = Design.read(path)
    if budgets and hours is not None:
        raise InputError("--budgets and --hours both say how long a study is; give one")
    if budgets:
        design = design.with_budgets(budgets)
    if hours is not None:
        design = design.replace(hours=hours, budgets=())
    return design if branches is None else design.replace(branches=branches)


def show_plan(document: dict[str, Any]) -> None:
    """Every run as a row, and all of it in a few lines."""
    from experiments.commands.options import bytes_in_words, console, count_in_words, hours_in_words, new_table

    out = console()
    names = ("run", "d_model", "layers", "N", "non-emb.", "D", "D/N", "epochs", "steps", "6ND", "exact", "rate")
    table = new_table(*names, "time", "memory", "", title=summary(document)[0])
    for row, after in zip(document["rungs"], [*document["rungs"][1:], None], strict=True):
        table.add_row(
            row["name"],
            str(row["d_model"]),
            str(row["num_layers"]),
            count_in_words(row["params"]),
            count_in_words(row["params_non_embedding"]),
            count_in_words(row["tokens"]),
            f"{row['tokens'] / row['params']:.3g}",
            f"{row['epochs']:.2f}",
            f"{row['steps']:,}",
            f"{row['flops_6nd']:.2e}",
            f"{row['flops_exact']:.2e}",
            f"{row['learning_rate']:.2g}",
            hours_in_words(row["hours"]),
            bytes_in_words(row["memory_bytes"]),
            _remarks(row),
            end_section=after is None or after["budget"] != row["budget"],
        )
    out.print(table)
    for line in summary(document)[1:]:
        out.print(line, highlight=False, soft_wrap=True)


def _remarks(row: dict[str, Any]) -> str:
    leaves = "" if row["trunk"] is None else f"leaves {row['trunk']} at {row['leave_step']:,}"
    return ", ".join(
        part for part in ("held out" if row["held_out"] else "", "repeated" if row["repeated"] else "", leaves) if part
    )


def summary(document: dict[str, Any]) -> list[str]:
    """The plan in words: what it is, what it costs, what branches save, what a reader should beware of."""
    from experiments.commands.options import bytes_in_words
    from experiments.commands.options import hours_in_words as hours

    total, design, alone = document["total"], document["design"], document["without_branches"]
    budgets, held_out = len(design["budgets"]), design["held_out"]
    costs = [
        f"{counted(total['runs'], 'run')} in {counted(total['compiles'], 'static shape')}, compiled once",
        f"{total['tokens']:.4g} tokens, {total['flops_6nd']:.3g} FLOPs (6ND), {total['flops_exact']:.3g} (exact)",
        f"{bytes_in_words(total['checkpoint_bytes'])} of checkpoints",
        f"{hours(total['hours'])} with one worker here, {hours(total['compile_hours'])} of it compiling"
        if total["hours"] is not None
        else "",
    ]
    held = {0: "none", 1: "the largest"}.get(held_out, f"the largest {held_out}")
    lines = [f"{counted(budgets, 'budget')}, {held} held out"]
    lines.append("; ".join(part for part in costs if part))
    if alone is not None:
        saved = alone["saved"]
        time = "" if alone["hours"] is None else f", {hours(alone['hours'])}"
        lines.append(
            f"without branches: {alone['flops_6nd']:.3g} FLOPs (6ND){time}; branches save {saved['flops_6nd']:.0%} of "
            f"the FLOPs, {saved['flops_6nd_fitted']:.0%} of those of the fitted budgets"
        )
    if total["repeated"]:
        lines.append(
            f"{total['repeated']} of the runs see some tokens more than once (an epoch is "
            f"{document['tokens_per_epoch']:,} tokens); such runs do not enter a fit"
        )
    return lines

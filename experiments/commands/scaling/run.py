"""Implement `isoflop scaling run`: a scaling study, from its definition to the test of its predictions."""

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.commands.options import JsonFile
from experiments.commands.scaling.plan import Definition, Folder

if TYPE_CHECKING:
    from experiments.scaling.study.design import Design


def run(
    design: Definition,
    *,
    data: Folder,
    out: Folder,
    budgets: tuple[float, ...] = (),
    hours: float | None = None,
    branches: bool | None = None,
    law: str | None = None,
    workers: int = 0,
    dry_run: bool = False,
    json: JsonFile = None,
) -> None:
    """Train the runs of a scaling study, fit its laws, and test them on budgets that were predicted before they ran.

    The same command resumes after a stop; no run is trained twice. FOLDER/sweep is a sweep like any other: `isoflop
    sweep status FOLDER/sweep --watch` shows its progress, `isoflop sweep worker FOLDER/sweep` adds a worker.

    Example: isoflop scaling run experiments/configs/sotu_ladder.toml --data data/sotu --out studies/sotu

    Args:
        design: The study's definition (see `experiments/scaling/study/design.py` for its keys).
        data: A folder made by `isoflop data prepare`.
        out: The study's folder.
        budgets: FLOPs (6·N·D) of one run of each budget, instead of the definition's budgets or hours.
        hours: Hours of training on this machine, for all runs together, instead of the definition's budgets or hours.
        branches: Whether runs of one size branch off one base run with a cooldown, instead of the definition's setting.
        law: A published law that places the expected optimum: see `isoflop scaling plan --help`.
        workers: Train in this many worker processes instead of this one.
        dry_run: Print what would run and what it costs, and stop.
        json: Also write the report's document to this file (with --dry-run: the plan).
    """
    from experiments.commands.options import write_document
    from experiments.commands.scaling.plan import plan, read_design
    from experiments.commands.scaling.report import write_report
    from experiments.scaling.study.run import run_study

    if dry_run:
        plan(design, data=data, budgets=budgets, hours=hours, branches=branches, law=law, json=json)
        return
    asked = _with_budgets(read_design(design, budgets=budgets, hours=hours, branches=branches, law=law), data, out)
    run_study(asked, data, out, workers)
    write_document(json, write_report(out))


def _with_budgets(design: "Design", data: Path, out: Path) -> "Design":
    """Return a design in hours with the budgets that fit into them; a study that has begun keeps its budgets."""
    from experiments.scaling.study.cost import plan_study
    from experiments.scaling.study.run import read_study

    if not design.hours:
        return design
    there = read_study(out)
    return design.with_budgets(there.budgets) if there is not None else plan_study(design, data).design

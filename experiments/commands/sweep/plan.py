"""Implement `isoflop sweep plan`: the trials of a sweep and their cost, before anything runs."""

from typing import TYPE_CHECKING

from experiments.commands.options import JsonFile
from experiments.commands.sweep.options import Options
from experiments.words import counted

if TYPE_CHECKING:
    from experiments.sweep.plan import SweepPlan


def plan(options: Options, *, probe: bool = True, json: JsonFile = None) -> None:
    """Show what a sweep would run: trials by static shape, lanes, compiles, tokens, FLOPs, bytes and hours.

    Only a few steps on random tokens are trained, to time this machine. Nothing is written.

    Example: isoflop sweep plan study-24 --data data/sotu --out sweeps/lr --steps 200
    --set learning_rate=logspace:1e-3:1e-1:5 num_layers=2,4 --seeds 3

    Args:
        probe: Time the training step of the smallest and the largest shape; --no-probe gives no hours.
        json: Also write the plan to this file.
    """
    from experiments.commands.options import write_document
    from experiments.sweep.plan import plan_sweep

    made = plan_sweep(options.define(), probe)
    write_document(json, made.to_dict())
    show_plan(made)


def show_plan(plan: "SweepPlan") -> None:
    """Print the cohorts as a table, and the totals in one line."""
    from experiments.commands.options import console, new_table
    from experiments.words import bytes_in_words, hours_in_words

    out = console()
    names = ("shape", "trials", "lanes", "compiles", "N", "steps", "tokens", "FLOPs (6ND)", "FLOPs (exact)")
    table = new_table(*names, "checkpoints", "memory", "time", title=counted(len(plan.cohorts), "static shape"))
    for row in plan.cohorts:
        low, high = row.steps
        table.add_row(
            row.label or "all",
            str(row.trials),
            str(row.lanes),
            str(row.compiles),
            f"{row.params:,}",
            f"{low:,}" if low == high else f"{low:,} … {high:,}",
            f"{row.tokens:.3g}",
            f"{row.flops_6nd:.3g}",
            f"{row.flops_exact:.3g}",
            bytes_in_words(row.checkpoint_bytes),
            bytes_in_words(row.memory_bytes),
            hours_in_words(row.hours),
        )
    out.print(table)
    out.print(summary(plan), highlight=False, soft_wrap=True)


def summary(plan: "SweepPlan") -> str:
    """Return the plan in one line."""
    from experiments.words import bytes_in_words, hours_in_words

    total, expected = plan.total, plan.expected
    about = "about " if plan.estimated else ""
    parts = [
        f"{about}{counted(total.trials, 'trial')} in {counted(len(plan.cohorts), 'static shape')}",
        f"{plan.done} of them done" if plan.done else "",
        f"at most {counted(total.compiles, 'compile')}",
        f"{total.tokens:.4g} tokens, {total.flops_6nd:.3g} FLOPs (6ND)",
        f"of which {plan.policy} is expected to spend {expected.share:.0%}" if expected.share < 1 else "",
        f"{bytes_in_words(total.checkpoint_bytes)} of checkpoints",
        f"{hours_in_words(total.hours)} with one worker here" if total.hours is not None else "",
    ]
    return "; ".join(part for part in parts if part)

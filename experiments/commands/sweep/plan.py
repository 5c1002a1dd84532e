"""Implement `isoflop sweep plan`: the trials of a sweep and their cost, before anything runs."""

from typing import Any

from experiments.commands.options import JsonFile
from experiments.commands.sweep.options import Options
from experiments.words import counted


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

    document = plan_sweep(options.define(), probe)
    write_document(json, document)
    show_plan(document)


def show_plan(document: dict[str, Any]) -> None:
    """Print the cohorts as a table, and the totals in one line."""
    from experiments.commands.options import console, new_table
    from experiments.words import bytes_in_words, hours_in_words

    out = console()
    names = ("shape", "trials", "lanes", "compiles", "N", "steps", "tokens", "FLOPs (6ND)", "FLOPs (exact)")
    table = new_table(*names, "checkpoints", "memory", "time", title=counted(len(document["cohorts"]), "static shape"))
    for row in document["cohorts"]:
        low, high = row["steps"]
        table.add_row(
            row["label"] or "all",
            str(row["trials"]),
            str(row["lanes"]),
            str(row["compiles"]),
            f"{row['params']:,}",
            f"{low:,}" if low == high else f"{low:,} … {high:,}",
            f"{row['tokens']:.3g}",
            f"{row['flops_6nd']:.3g}",
            f"{row['flops_exact']:.3g}",
            bytes_in_words(row["checkpoint_bytes"]),
            bytes_in_words(row["memory_bytes"]),
            hours_in_words(row["hours"]),
        )
    out.print(table)
    out.print(summary(document), highlight=False, soft_wrap=True)


def summary(document: dict[str, Any]) -> str:
    """Return the plan in one line."""
    from experiments.words import bytes_in_words, hours_in_words

    total, expected = document["total"], document["expected"]
    about = "about " if document["estimated"] else ""
    parts = [
        f"{about}{counted(total['trials'], 'trial')} in {counted(len(document['cohorts']), 'static shape')}",
        f"{document['done']} of them done" if document["done"] else "",
        f"at most {counted(total['compiles'], 'compile')}",
        f"{total['tokens']:.4g} tokens, {total['flops_6nd']:.3g} FLOPs (6ND)",
        f"of which {document['policy']} is expected to spend {expected['share']:.0%}" if expected["share"] < 1 else "",
        f"{bytes_in_words(total['checkpoint_bytes'])} of checkpoints",
        f"{hours_in_words(total['hours'])} with one worker here" if total["hours"] is not None else "",
    ]
    return "; ".join(part for part in parts if part)

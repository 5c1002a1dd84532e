"""Print the answers of `isoflop scaling predict`."""

from typing import TYPE_CHECKING

from experiments.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from experiments.scaling.fit import Fits
    from experiments.scaling.questions import Answers, PlannedRun, Refused
    from experiments.scaling.serving import ServingCost, ServingOptimum
    from experiments.scaling.use import Extrapolation, OptimalRun


def show(
    console: "Console",
    answers: "Answers",
    fits: "Fits",
    cost: "ServingCost | None",
    *,
    level: float,
    warnings: "Sequence[str]",
) -> None:
    """Print every answer with its interval and its distance from the runs. level: of the intervals, in per cent."""
    from experiments.scaling.questions import Refused

    if fits.parametric is not None:
        law = fits.parametric
        left_out = [
            (len(fits.table.dropped), "dropped row"),
            (len(fits.parametric_outliers), "gross outlier"),
        ]
        counts = [counted(len(fits.table), "run")] + [counted(count, what) for count, what in left_out if count]
        console.print(
            f"{', '.join(counts)}; L = {law.E:.4g} + {law.A:.4g}·N^-{law.alpha:.4g} + {law.B:.4g}·D^-{law.beta:.4g}",
            highlight=False,
        )
    for by_estimator in answers.optimal:
        _show_optimal(console, by_estimator, level)
    for needed in answers.compute_for_loss:
        if isinstance(needed, Refused):
            _print_refusal(console, needed, f"Loss {needed.question['target']:g}")
            continue
        _say(
            console,
            f"Loss {needed.target:g} takes {needed.flops:.4g} FLOPs ({level:g} %: {_bound(needed.interval[0])} … "
            f"{_bound(needed.interval[1])}): N {needed.params:.4g}, D {needed.tokens:.4g}",
            needed.extrapolation,
        )
        if needed.unreachable_share:
            share = 100 * needed.unreachable_share
            console.print(f"  {share:.2g} % of the bootstrap's laws never reach it", highlight=False)
    for planned in answers.planned:
        if isinstance(planned, Refused):
            asked = planned.question
            _print_refusal(console, planned, f"N {asked['params']:.4g} on D {asked['tokens']:.4g}")
        else:
            _show_planned(console, planned)
    for served in answers.serving:
        if isinstance(served, Refused):
            asked = served.question
            goal = f"loss {asked['target']:g}" if "target" in asked else f"{asked['training_flops']:.4g} FLOPs"
            _print_refusal(console, served, f"Serving {asked['served_tokens']:.4g} tokens at {goal}")
        else:
            _show_serving(console, served)
    if cost is not None:
        console.print(_price(cost), highlight=False)
    for name, reason in fits.refused.items():
        console.print(f"[bold]{name} refused:[/bold] {reason}", highlight=False)
    for text in warnings:
        console.print(f"[yellow]warning:[/yellow] {text}", highlight=False)
    if fits.parametric is not None and not answers.planned:
        console.print("Whether held-out budgets prefer another form of law: `isoflop scaling fit`.", highlight=False)


def _show_planned(console: "Console", planned: "PlannedRun") -> None:
    told, forms = planned.by_law, planned.by_form
    low, high = told.interval
    _say(
        console,
        f"N {told.params:.4g} on D {told.tokens:.4g} ({told.flops:.4g} FLOPs): loss "
        f"{told.loss:.4f} nats per token ({told.level:g} % of such runs: {low:.4f} … {high:.4f})",
        told.extrapolation,
    )
    if isinstance(forms, str):
        console.print(f"  other forms of law are not compared: {forms}", highlight=False)
        return
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in forms.losses.items())
    console.print(
        f"  by form of law, fitted to {counted(forms.runs, 'run')}: {losses}\n  on held-out budgets {forms.reason}",
        highlight=False,
    )


def _show_optimal(console: "Console", answer: "dict[str, OptimalRun | Refused]", level: float) -> None:
    from experiments.commands.options import new_table
    from experiments.scaling.analysis import NAMES
    from experiments.scaling.questions import Refused

    known: dict[str, OptimalRun] = {}
    for name, one in answer.items():
        if isinstance(one, Refused):  # a budget that is not positive: no estimator answers
            _print_refusal(console, one, f"{one.question['flops']:g} FLOPs")
            return
        known[name] = one
    flops = next(iter(known.values())).flops
    sure = f"{level:g} %"
    names = ("", "N*", sure, "D*", sure, "D*/N*", "loss", sure)
    table = new_table(*names, title=f"Compute-optimal run of {flops:.4g} FLOPs")
    for name, best in known.items():
        intervals = best.intervals or {}
        cells = []
        for key, value in (("params", best.params), ("tokens", best.tokens), ("loss", best.loss)):
            digits = ".4f" if key == "loss" else ".4g"
            cells.append("" if value is None else f"{value:{digits}}")
            cells.append(" … ".join(f"{bound:{digits}}" for bound in intervals[key]) if key in intervals else "")
            if key == "tokens":
                cells.append(f"{best.tokens / best.params:.3g}")
        table.add_row(NAMES[name], *cells)
    console.print(table)
    by_reach: dict[str, list[str]] = {}
    for name, best in known.items():
        by_reach.setdefault(f"{best.extrapolation.flops_over_largest:.2g}", []).append(name)
    for members in by_reach.values():  # valleys need whole budgets, so the largest that they saw may be smaller
        who = "" if len(by_reach) == 1 else " and ".join(NAMES[name] for name in members) + ": "
        _show_distance(console, known[members[0]].extrapolation, who)


def _print_refusal(console: "Console", refused: "Refused", question: str) -> None:
    """Print why a question has no answer."""
    console.print(f"[bold]{question} refused:[/bold] {refused.reason}", highlight=False, soft_wrap=True)


def _show_serving(console: "Console", answer: "ServingOptimum") -> None:
    alone = answer.training_optimal
    low, high = answer.interval["params"]
    hours = answer.cost.unit == "seconds"

    def amount(value: float) -> str:
        return f"{value / 3600:.4g} hours" if hours else f"{value:.4g} FLOPs"

    _say(
        console,
        f"Serving {answer.served_tokens:.4g} tokens at loss {answer.target:.4f}: N {answer.params:.4g} "
        f"({answer.level:g} %: {low:.4g} … {high:.4g}) on D {answer.tokens:.4g}, {answer.flops:.4g} FLOPs of "
        "training",
        answer.extrapolation,
    )
    console.print(
        f"  in all {amount(answer.total_cost)} ({amount(answer.training_cost)} training, "
        f"{amount(answer.serving_cost)} serving); N {alone.params:.4g}, best for training alone, would take "
        f"{amount(alone.total_cost)}: {100 * answer.saving:.3g} % saved",
        highlight=False,
    )
    measured = answer.cost.measured_params
    if measured and not measured[0] <= answer.params <= measured[-1]:
        console.print(
            f"  what serving costs at this N is extrapolated from measurements at {_sizes(measured)}", highlight=False
        )


def _price(cost: "ServingCost") -> str:
    """Describe how serving was priced."""
    if cost.unit == "FLOPs":
        return (
            "A served token is taken to cost 2·N FLOPs, as no measurement was given; decoding reads every weight for "
            "few operations, so that in time it costs more: measure it and give --decode and --train."
        )
    return (
        f"A served token takes {cost.coefficient:.3g}·N^{cost.exponent:.3g} seconds by measurements at "
        f"{_sizes(cost.measured_params)} (tables counted), training {1 / cost.training_unit:.4g} FLOPs a second at "
        "every size; hours are of the device measured."
    )


def _sizes(measured: "Sequence[float]") -> str:
    return "N = " + ", ".join(f"{size:.3g}" for size in measured)


def _say(console: "Console", words: str, extrapolated: "Extrapolation") -> None:
    console.print(words, highlight=False)
    _show_distance(console, extrapolated)


def _show_distance(console: "Console", extrapolated: "Extrapolation", who: str = "") -> None:
    from experiments.scaling.use import in_words, is_far

    console.print(
        f"  {who}{in_words(extrapolated)}", style="bold red" if is_far(extrapolated) else None, highlight=False
    )


def _bound(value: float | None) -> str:
    return "never" if value is None else f"{value:.4g}"

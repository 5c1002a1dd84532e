"""Print the answers of `isoflop scaling predict`."""

from typing import TYPE_CHECKING, Any

from experiments.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from experiments.scaling.fit import Fits
    from experiments.scaling.serving import ServingCost


def show(console: "Console", document: dict[str, Any], fits: "Fits", cost: "ServingCost | None") -> None:
    """Print every answer of the command's document with its interval and its distance from the runs."""
    if fits.parametric is not None:
        law = fits.parametric
        left_out = [
            (len(document["dropped"]), "dropped row"),
            (len(document["parametric_outliers"]), "gross outlier"),
        ]
        counts = [counted(document["rows"], "run")] + [counted(count, what) for count, what in left_out if count]
        console.print(
            f"{', '.join(counts)}; L = {law.E:.4g} + {law.A:.4g}·N^-{law.alpha:.4g} + {law.B:.4g}·D^-{law.beta:.4g}",
            highlight=False,
        )
    for answer in document["optimal"]:
        _show_optimal(console, answer, document["level"])
    for answer in document["compute_for_loss"]:
        if _print_refusal(console, answer, f"Loss {answer['target']:g}"):
            continue
        low, high = answer["interval"]
        _say(
            console,
            f"Loss {answer['target']:g} takes {answer['flops']:.4g} FLOPs ({document['level']:g} %: {_bound(low)} … "
            f"{_bound(high)}): N {answer['params']:.4g}, D {answer['tokens']:.4g}",
            answer["extrapolation"],
        )
        if answer["unreachable_share"]:
            share = 100 * answer["unreachable_share"]
            console.print(f"  {share:.2g} % of the bootstrap's laws never reach it", highlight=False)
    for answer in document["planned"]:
        if _print_refusal(console, answer, f"N {answer['params']:.4g} on D {answer['tokens']:.4g}"):
            continue
        low, high = answer["interval"]
        _say(
            console,
            f"N {answer['params']:.4g} on D {answer['tokens']:.4g} ({answer['flops']:.4g} FLOPs): loss "
            f"{answer['loss']:.4f} nats per token ({document['level']:g} % of such runs: {low:.4f} … {high:.4f})",
            answer["extrapolation"],
        )
        console.print(_by_form(answer["forms"]), highlight=False)
    for answer in document["serving"]:
        goal = f"loss {answer['target']:g}" if "target" in answer else f"{answer['training_flops']:.4g} FLOPs"
        if not _print_refusal(console, answer, f"Serving {answer['served_tokens']:.4g} tokens at {goal}"):
            _show_serving(console, answer)
    if cost is not None:
        console.print(_price(cost), highlight=False)
    for name, reason in fits.refused.items():
        console.print(f"[bold]{name} refused:[/bold] {reason}", highlight=False)
    for text in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {text}", highlight=False)
    if fits.parametric is not None and not document["planned"]:
        console.print("Whether held-out budgets prefer another form of law: `isoflop scaling fit`.", highlight=False)


def _by_form(forms: dict[str, Any]) -> str:
    if "refused" in forms:
        return f"  other forms of law are not compared: {forms['refused']}"
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in forms["losses"].items())
    return (
        f"  by form of law, fitted to {counted(forms['runs'], 'run')}: {losses}\n  on "
        f"held-out budgets {forms['reason']}"
    )


def _show_optimal(console: "Console", answer: dict[str, Any], level: float) -> None:
    from experiments.commands.options import new_table
    from experiments.scaling.analysis import NAMES
    from experiments.scaling.questions import is_refused

    refused = next((one for one in answer.values() if is_refused(one)), None)
    if refused is not None:  # a budget that is not positive: no estimator answers
        _print_refusal(console, refused, f"{refused['flops']:g} FLOPs")
        return
    flops = next(iter(answer.values()))["flops"]
    sure = f"{level:g} %"
    names = ("", "N*", sure, "D*", sure, "D*/N*", "loss", sure)
    table = new_table(*names, title=f"Compute-optimal run of {flops:.4g} FLOPs")
    for name, one in answer.items():
        intervals = one["intervals"] or {}
        cells = []
        for key in ("params", "tokens", "loss"):
            digits = ".4f" if key == "loss" else ".4g"
            cells.append("" if one[key] is None else f"{one[key]:{digits}}")
            cells.append(" … ".join(f"{bound:{digits}}" for bound in intervals[key]) if key in intervals else "")
            if key == "tokens":
                cells.append(f"{one['tokens'] / one['params']:.3g}")
        table.add_row(NAMES[name], *cells)
    console.print(table)
    by_reach: dict[str, list[str]] = {}
    for name, one in answer.items():
        by_reach.setdefault(f"{one['extrapolation']['flops_over_largest']:.2g}", []).append(name)
    for members in by_reach.values():  # valleys need whole budgets, so the largest that they saw may be smaller
        who = "" if len(by_reach) == 1 else " and ".join(NAMES[name] for name in members) + ": "
        _show_distance(console, answer[members[0]]["extrapolation"], who)


def _print_refusal(console: "Console", answer: dict[str, Any], question: str) -> bool:
    """Print the reason if a question has no answer; return whether it has none."""
    from experiments.scaling.questions import is_refused

    if is_refused(answer):
        console.print(f"[bold]{question} refused:[/bold] {answer['refused']}", highlight=False, soft_wrap=True)
    return is_refused(answer)


def _show_serving(console: "Console", answer: dict[str, Any]) -> None:
    alone, spread = answer["training_optimal"], answer["interval"]
    low, high = spread["params"]
    hours = answer["unit"] == "seconds"

    def amount(value: float) -> str:
        return f"{value / 3600:.4g} hours" if hours else f"{value:.4g} FLOPs"

    _say(
        console,
        f"Serving {answer['served_tokens']:.4g} tokens at loss {answer['target']:.4f}: N {answer['params']:.4g} "
        f"({answer['level']:g} %: {low:.4g} … {high:.4g}) on D {answer['tokens']:.4g}, {answer['flops']:.4g} FLOPs of "
        "training",
        answer["extrapolation"],
    )
    console.print(
        f"  in all {amount(answer['total_cost'])} ({amount(answer['training_cost'])} training, "
        f"{amount(answer['serving_cost'])} serving); N {alone['params']:.4g}, best for training alone, would take "
        f"{amount(alone['total_cost'])}: {100 * answer['saving']:.3g} % saved",
        highlight=False,
    )
    measured = answer["cost_per_token"]["measured_params"]
    if measured and not measured[0] <= answer["params"] <= measured[-1]:
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


def _say(console: "Console", words: str, extrapolated: dict[str, Any]) -> None:
    console.print(words, highlight=False)
    _show_distance(console, extrapolated)


def _show_distance(console: "Console", extrapolated: dict[str, Any], who: str = "") -> None:
    from experiments.scaling.use import in_words, is_far

    console.print(
        f"  {who}{in_words(extrapolated)}", style="bold red" if is_far(extrapolated) else None, highlight=False
    )


def _bound(value: float | None) -> str:
    return "never" if value is None else f"{value:.4g}"

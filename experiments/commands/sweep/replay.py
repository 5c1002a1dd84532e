"""Implement `isoflop sweep replay`: what a search or successive halving would have needed on a recorded sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from experiments.commands.options import JsonFile, PlotFile
from experiments.words import counted

if TYPE_CHECKING:
    from experiments.sweep.search.replay import SamplerComparison
    from experiments.sweep.search.replay_halving import HalvingReplay


def replay(
    source: tyro.conf.Positional[Path],
    *,
    samplers: tuple[str, ...] = ("random", "tpe"),
    replays: int = 20,
    trials: int | None = None,
    batch: int = 1,
    axes: tuple[str, ...] = (),
    eta: float = 3,
    min_fraction: float = 1 / 9,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Replay searches on a recorded grid: how many trials until the best region is tried, and until it is selected.

    The best region is the set of points whose mean is within one standard deviation of a single run (over seeds) of the
    best mean. A trial returns the loss of a random seed of its point; nothing is trained. For a sweep's folder,
    successive halving is replayed too: the tokens that it would have used, and whether it would have kept the winner.

    Example: isoflop sweep replay sweeps/lr --samplers random tpe gp --replays 20 --json replay.json

    Args:
        source: A sweep's folder, or a table of its results (CSV, one run a row, with a column loss).
        samplers: One or more of random, quasirandom, tpe, gp (needs torch), cmaes.
        replays: Searches of each sampler, with the seeds 0, 1, …
        trials: Trials of each search; by default as many as the grid has points.
        batch: Trials that are requested before any of them is reported, as lanes are.
        axes: The varied columns; by default all columns that vary, except results.
        eta: For successive halving: one in ETA points continues.
        min_fraction: For successive halving: tokens at the first rung, as a fraction of all.
        json: Also write the numbers to this file.
        plot: Draw the share of searches that have reached the region, over trials (.svg, .png or .pdf).
    """
    from experiments.commands.options import check_plot, write_document, write_plot
    from experiments.sweep.search.recorded import read_recorded
    from experiments.sweep.search.replay import compare_samplers
    from experiments.sweep.search.replay_halving import HalvingReplay, read_curves, replay_halving
    from model.errors import InputError
    from train.progress import progress_bar

    check_plot(plot)
    recorded = read_recorded(source, axes)
    with progress_bar("replay", len(samplers) * replays) as advance:
        found = compare_samplers(recorded, samplers, replays=replays, budget=trials, batch=batch, advance=advance)
    halving: HalvingReplay | str | None = None
    if recorded.folder is not None:
        try:
            halving = replay_halving(
                recorded, read_curves(recorded), eta=eta, min_fraction=min_fraction, replays=replays
            )
        except InputError as error:
            halving = str(error)
    refused = {"refused": halving} if isinstance(halving, str) else None
    replayed = halving.to_dict() if isinstance(halving, HalvingReplay) else refused
    write_document(json, found.to_dict() | {"halving": replayed})
    show(found, halving)
    if plot is not None:
        from experiments.sweep.figures.lines import reached

        write_plot(plot, reached(found), "share of searches in the best region against trials")


def show(found: "SamplerComparison", halving: "HalvingReplay | str | None") -> None:
    """Print the replay's results. halving: or why it was refused; None if there are no curves to replay it on."""
    from experiments.commands.options import console, new_table

    out = console()
    out.print(
        f"best region: {len(found.best_region)} of {found.points} points within {found.seed_noise:.4f} nats (one run's "
        f"noise) of {found.best_mean:.4f} at {_words(found.best)}",
        highlight=False,
    )
    searches = f"{counted(found.replays, 'search', 'searches')} of {counted(found.budget, 'trial')}"
    out.print(f"trials until …, median (quartiles) over {searches}", highlight=False)
    table = new_table("sampler", "first in the best region", "best point stays in it")
    for name, own in found.samplers.items():
        table.add_row(
            name, *(_quartiles(three, found.budget) for three in (own.first_quartiles, own.settled_quartiles))
        )
    out.print(table)
    if halving is None:
        return
    if isinstance(halving, str):
        out.print(f"successive halving: refused: {halving}", highlight=False)
        return
    whole = halving.all_seeds
    verdict = "within" if whole.within_noise else "outside"
    chosen = "no point" if whole.chosen is None else _words(whole.chosen)
    out.print(
        f"successive halving: {whole.tokens_fraction:.1%} of the tokens, chooses {chosen}: {verdict} the best "
        f"region; with one seed a point within it {halving.one_seed.within_noise:.0%} of the time",
        highlight=False,
    )
    if halving.rungs == "training":
        out.print("training losses were used at its rungs: the runs were not validated at them", highlight=False)


def _quartiles(quartiles: list[int | None], budget: int) -> str:
    low, median, high = (f"> {budget}" if value is None else str(value) for value in quartiles)
    return f"{median} ({low} … {high})"


def _words(point: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in point.items()
    )

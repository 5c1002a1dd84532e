"""Show the progress of a sweep: its cohorts, the best so far with its noise, the remaining work."""

import contextlib
import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from experiments.sweep.analysis.executions import one_per_training
from experiments.sweep.analysis.ranking import ranking
from experiments.sweep.analysis.results import collect
from experiments.sweep.analysis.scales import setting_text
from experiments.sweep.objectives import LOSS, direction
from experiments.sweep.record import Sweep
from experiments.sweep.row import ENDED, LedgerRow, State
from experiments.words import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

_RECENT = 32
"""So many of the newest results tell how fast the sweep is now: it may have rested in between."""


@dataclasses.dataclass(frozen=True)
class CohortStanding:
    """The number of trials of one static shape in each state."""

    cohort: str
    shape: str
    trials: int
    states: dict[str, int]


@dataclasses.dataclass(frozen=True)
class BestSoFar:
    """The best mean of the first objective over finished replicates, and the noise of one run there."""

    setting: dict[str, Any]
    objective: str
    mean: float
    std: float | None
    seeds: int
    from_steps: int
    """The update from which a member of a population has had these values; 0 for other trials."""
    settings: int
    """The number of all settings."""
    ended: int
    """The number of settings that were trained to the end."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """The state of a sweep."""

    folder: str
    done: bool
    trials: int
    points_to_draw: int
    states: dict[str, int]
    cohorts: list[CohortStanding]
    best: BestSoFar | None
    tokens_done: int
    tokens_expected: int
    """The tokens of the whole sweep, if nothing more is stopped early."""
    seconds_left: float | None
    """The time left at the speed of the newest results; None before the first one."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def standing(sweep: Sweep, rows: Sequence[LedgerRow], asked: int = 0) -> Standing:
    """Return the progress of the sweep. asked: points drawn by its sampler."""
    states = Counter(row.state for row in rows)
    tokens = {row.trial.id: _tokens(sweep, row) for row in rows}
    expected = sum(_planned_tokens(row) if row.state not in ENDED else tokens[row.trial.id] for row in rows)
    missing = max(0, sweep.trials - asked) if sweep.sampler != "all" else 0
    if missing and rows:
        expected += round(missing * len(sweep.seeds) * statistics.fmean(map(_planned_tokens, rows)))
    done = sum(tokens.values())
    return Standing(
        folder=str(sweep.folder),
        done=not missing and not states["planned"] and not states["running"],
        trials=len(rows),
        points_to_draw=missing,
        states={state: states[state] for state in get_args(State)},
        cohorts=[_cohort(name, rows) for name in dict.fromkeys(row.trial.cohort for row in rows)],
        best=_best(sweep, rows),
        tokens_done=done,
        tokens_expected=expected,
        seconds_left=_seconds_left(rows, tokens, expected - done),
    )


def _best(sweep: Sweep, rows: Sequence[LedgerRow]) -> BestSoFar | None:
    """Return the best mean of the first objective over finished replicates, and the noise of one run there.

    Where losses are different functions, it is that of the objective that ranks in the report. Settings count as there:
    none with a diverged or pruned run, and a member of a population that branched off is a separate setting with its
    values from update `from_steps` on. All executions of a recipe are one run.
    """
    flat = collect(sweep.folder, rows, objectives=sweep.objectives, policy=sweep.policy, sampler=sweep.sampler)
    ranked = ranking(flat.axes, sweep.objectives)
    objective = sweep.objectives[0] if ranked.by_loss else ranked.objective
    points = {row.trial.id: json.loads(row.trial.point_key) for row in rows}
    how = flat.executions if objective == LOSS else ()
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in one_per_training(flat.rows) if objective == LOSS else flat.rows:
        point = {name: value for name, value in points[row["id"]].items() if name not in how}
        groups.setdefault((json.dumps(point), row["member"]), []).append(row)
    found = []
    for (key, member), members in groups.items():
        values = [row[objective] for row in members if row["state"] == "finished" and row[objective] is not None]
        if values and not any(row["state"] in ("diverged", "pruned") for row in members):
            found.append((statistics.fmean(values), key, values, members[0]["parent_steps"] if member else 0))
    if not found:
        return None
    sign = 1 if direction(objective) == "minimize" else -1
    mean, key, values, from_steps = min(found, key=lambda one: sign * one[0])
    return BestSoFar(
        setting=json.loads(key),
        objective=objective,
        mean=mean,
        std=statistics.stdev(values) if len(values) > 1 else None,
        seeds=len(values),
        from_steps=from_steps,
        settings=len(groups),
        ended=len(found),
    )


def table(now: Standing) -> "RenderableType":
    """Return how a sweep stands as a table for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    out = Table(title=f"{now.folder}: {counted(now.trials, 'trial')}", title_justify="left")
    shown = ("planned", "running", "finished", "pruned", "diverged", "failed")
    for name in ("cohort", "model", "trials", *shown):
        out.add_column(name, justify="left" if name in ("cohort", "model") else "right")
    for row in now.cohorts:
        counts = (str(row.states[name] or "") for name in shown)
        out.add_row(row.cohort, row.shape, str(row.trials), *counts)
    lines = [
        f"{now.tokens_done:,} of at most {now.tokens_expected:,} tokens"
        + (f", {_duration(now.seconds_left)} left" if now.seconds_left else "")
        + (f", {counted(now.points_to_draw, 'point')} yet to be drawn" if now.points_to_draw else "")
    ]
    if now.best is not None:
        lines.append(_words(now.best))
    return Group(out, *(Text(line) for line in lines))


def _words(found: BestSoFar) -> str:
    """Return the best so far in one line."""
    highest = direction(found.objective) == "maximize"
    setting = setting_text(found.setting) or "the base"
    if found.from_steps:
        setting += f" from update {found.from_steps:,} on"
    digits = ".4f" if found.objective == LOSS else ",.0f" if found.mean >= 100 else ".4g"
    value = f"{found.mean:{digits}}"
    noise = f" ± {found.std:{digits}} over {found.seeds} seeds" if found.std is not None else " (one seed)"
    which = f"best so far ({'highest' if highest else 'lowest'} {found.objective}): {setting}: {value}{noise}"
    return f"{which}; trained to the end: {found.ended} of {found.settings} settings"


def watch(look: Callable[[], Standing], going: Callable[[], bool] = lambda: True) -> None:
    """Show `look()` until the sweep is done or nothing is running (`going`).

    On a terminal the table is live; elsewhere a line is printed when something has changed.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        before: Any = None
        while True:
            still, now = going(), look()
            if live is not None:
                live.update(table(now), refresh=True)
            elif now.states != before:
                before = now.states
                said = ", ".join(f"{count} {name}" for name, count in before.items() if count)
                console.print(f"sweep: {said or 'no trials yet'}", highlight=False)
            if now.done or not still:
                return
            time.sleep(2.0)


def _cohort(name: str, rows: Sequence[LedgerRow]) -> CohortStanding:
    members = [row for row in rows if row.trial.cohort == name]
    recipe = members[0].trial.recipe
    config, train_config = recipe.model, recipe.train
    states = Counter(row.state for row in members)
    return CohortStanding(
        cohort=name,
        shape=f"{config.num_layers} × {config.d_model}, {train_config.batch_size} × {train_config.seq_len} tokens",
        trials=len(members),
        states={state: states[state] for state in get_args(State)},
    )


def _planned_tokens(row: LedgerRow) -> int:
    """Return the tokens that the trial trains itself; those before it branches off are trained by its parent."""
    return row.trial.steps * row.trial.recipe.train.tokens_per_step - _shared_tokens(row)


def _shared_tokens(row: LedgerRow) -> int:
    parent = row.trial.parent
    return 0 if parent is None else parent[1] * row.trial.recipe.train.tokens_per_step


def _tokens(sweep: Sweep, row: LedgerRow) -> int:
    """Return the tokens that a trial itself has seen up to now, by its record while it runs."""
    known = int(row.facts.get("tokens", row.steps_done * row.trial.recipe.train.tokens_per_step))
    if row.state == "running":
        known = max(known, _recorded_tokens(sweep.run_folder(row.trial) / "metrics.jsonl"))
    return max(0, known - _shared_tokens(row))


def _recorded_tokens(path: Path) -> int:
    """Return the tokens in the last whole line of a record that may still be written to."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            line = file.read().rsplit(b"\n", 2)[-2]
        return int(json.loads(line)["tokens"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0


def _seconds_left(rows: Sequence[LedgerRow], tokens: dict[str, int], left: int) -> float | None:
    timed = [row for row in rows if "ended_at" in row.facts and "claimed_at" in row.facts]
    recent = sorted(timed, key=lambda row: row.facts["ended_at"])[-_RECENT:]
    if not recent or left <= 0:
        return None
    began = min(row.facts["claimed_at"] for row in recent)
    # Trials that overlap with them shared the machine.
    with_them = [row for row in timed if row.facts["ended_at"] >= began]
    seconds = max(row.facts["ended_at"] for row in with_them) - began
    return left * seconds / max(1, sum(tokens[row.trial.id] for row in with_them))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{rest} s"

"""Describe the answer of a sweep in a few sentences, in which every setting is counted once."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.sweep.analysis.executions import ExecutionComparison, execution_text
from experiments.sweep.analysis.outcome import Summary, Winner
from experiments.sweep.analysis.ranking import Ranking
from experiments.sweep.analysis.rungs import Stretch, verdicts
from experiments.sweep.analysis.scales import setting_text, text
from experiments.sweep.analysis.settings import Setting, by_setting, candidates_of, group
from experiments.sweep.analysis.summary import fate
from experiments.sweep.objectives import direction
from experiments.words import is_or_are
from train.objectives import LanguageModeling

_STOPPED = {
    "worse": "{} worse by more than the seed noise",
    "higher": "{} at a higher loss",
    "equal": "{} within the seed noise of it",
    "lower": "{} at a lower loss",
    "better": "{} better by more than the seed noise",
    "not compared": "{} where it has no loss to compare",
}


def sentence(summary: Summary, policy: str = "all", unit: str = LanguageModeling.UNIT) -> str:
    """Describe the winner, its uncertainty, its equals within noise, and the settings not compared at the end."""
    winner, settings = summary.winner, summary.settings
    executions = _describe_executions(summary.executions)
    if winner is None:
        return f"There is no winner: {summary.warnings[0].split(':')[0]}." + _describe_others(settings) + executions
    ranked = summary.ranking
    said = [_reached(winner, unit, len(settings), policy, ranked) + _told_apart(winner, settings)]
    if not ranked.by_loss:
        said.append(ranked.reason())
    if winner.lineage is not None:
        said.append(_describe_history(winner.lineage))
    return " ".join(said) + _describe_others(settings, policy) + executions


def leader(names: Sequence[str], rows: Sequence[dict[str, Any]], objective: str) -> str | None:
    """Return which settings have the best mean of an objective, those that share it named by what they have in common.

    None if no candidate has a value.
    """
    allowed = {setting.key for setting in candidates_of(group(names, rows))}
    means = {
        key: float(np.mean([row[objective] for row in members if row["state"] == "finished"]))
        for key, members in by_setting(names, rows).items()
        if key in allowed and all(row[objective] is not None for row in members if row["state"] == "finished")
    }
    if not means:
        return None
    highest = direction(objective) == "maximize"
    best = max(means.values()) if highest else min(means.values())
    first = [dict(zip((*names, "member"), key, strict=True)) for key, mean in means.items() if mean == best]
    common = {name: first[0][name] for name in names if len({str(row[name]) for row in first}) == 1}
    where = setting_text(common) or ("all settings" if len(first) == len(means) else f"{len(first)} settings")
    among = f" ({len(first)} settings)" if len(first) > 1 and common else ""
    value = f"{best:,.0f}" if best >= 100 else f"{best:.4g}"
    return f"The {'highest' if highest else 'lowest'} {objective}, {value}, is that of {where}{among}."


def _describe_executions(found: ExecutionComparison | None) -> str:
    """Describe how far the losses of one recipe differ between executions, and which execution trains fastest.

    Differences that rounding does not explain become a warning instead.
    """
    if found is None:
        return ""
    return "".join(f" {said}" for said in (_losses_under(found), _fastest(found)) if said)


def _losses_under(found: ExecutionComparison) -> str:
    count, difference = len(found.executions), found.difference
    if difference is None or found.verdict is None:
        return "No recipe has finished under two executions: their losses are not compared."
    if difference == 0:
        return f"The losses under {count} executions are equal to the last bit."
    most = f"The losses under {count} executions differ by at most {difference:.2g} nats"
    return {
        "rounding": f"{most}, by rounding: they are indistinguishable.",
        "noise": f"{most}, no more than with other seeds: they are indistinguishable.",
        "open": f"{most}, which rounding may have grown to; without a second seed it is not known whether "
        "seeds differ by more.",
        "beyond": "",
    }[found.verdict]


def _fastest(found: ExecutionComparison) -> str:
    timed = [(row, row.ratio) for row in found.executions if row.ratio is not None]
    if not timed:
        return ""
    (first, _), (last, ratio) = timed[0], timed[-1]
    spread = "" if first.std is None else f" ± {first.std:,.0f}"
    said = (
        f"Training is fastest with {execution_text(first.execution)}: {first.tokens_per_second:,.0f}{spread} tokens/s, "
        f"{1 / ratio:.2g} times the slowest ({execution_text(last.execution)})"
    )
    near = sum(bool(row.near) for row, _ in timed[1:])
    if first.std is None:
        return f"{said}; with one trial each the spread is not known."
    return f"{said}; {near} of the others {is_or_are(near)} within the spread of it." if near else f"{said}."


def _reached(winner: Winner, unit: str, total: int, policy: str, ranked: Ranking) -> str:
    setting = setting_text(winner.setting)
    if policy == "population":
        subject = f"The best member, {setting} at its end," if setting else "The best member"
    else:
        subject = setting or "The only setting"
    said = f"{subject} reaches " + (
        f"{winner.mean:.4f} {unit}" if ranked.by_loss else f"{ranked.words} {winner.mean:.4f}"
    )
    if winner.interval_95 is not None:
        low, high = winner.interval_95
        said += f" (95 % interval {low:.4f} … {high:.4f})"
    ended, what = winner.candidates, "members" if policy == "population" else "settings"
    if total == 1:
        return said
    if ended == 1:
        return f"{said}, the only one of {total} {what} that was trained to the end"
    said += f", the {ranked.best} of {ended} {what}" + (" that were trained to the end" if ended < total else "")
    tied = len(winner.tied)
    return said + (f", which {tied} {'other has' if tied == 1 else 'others have'} too" if tied else "")


def _told_apart(winner: Winner, settings: Sequence[Setting]) -> str:
    if winner.interval_95 is None:
        if any(row.member is not None for row in settings):
            return "; no two had the same settings throughout, so it is not known how sure that is."
        single = all(row.seeds + row.lost + row.pruned + row.failed + row.pending == 1 for row in settings)
        return f"; {'with one seed each' if single else 'without a second seed'} it is not known how sure that is."
    others, equal = winner.candidates - 1, len(winner.indistinguishable or ())
    if others == 0:
        return "."
    if equal == 0:
        return "; every other of them is worse by more than the seed noise."
    if equal == others:
        return f"; the {'other one' if equal == 1 else f'{equal} others'} cannot be distinguished from it."
    return f"; {equal} of them cannot be distinguished from it, the others are worse by more than the seed noise."


def _describe_history(lineage: Sequence[Stretch]) -> str:
    """Describe the successive values that the winner of a population was trained with."""
    parts, varied = [], list(lineage[0].setting)
    for name in varied:
        values = [part.setting[name] for part in lineage]
        if len({str(value) for value in values}) > 1:
            following = [*values[1:], None]
            held = zip(lineage, values, following, strict=True)
            ends = [(part.steps, value) for part, value, after in held if value != after]
            spans = [f"{text(value)} up to update {step:,}" for step, value in ends]
            parts.append(f"{name} was {', then '.join(spans)}")
    if not parts:
        return f"It left another member's run after update {lineage[-2].steps:,}, with the same settings."
    return "Its settings changed along its run: " + "; ".join(parts) + "."


def _describe_others(settings: Sequence[Setting], policy: str = "all") -> str:
    """Describe the settings that are not compared at the end."""
    said = ""
    stopped = [row for row in settings if row.pruned and not row.lost]
    if stopped:
        count = len(stopped)
        where = Counter(row.stopped.steps for row in stopped if row.stopped)
        places = ", ".join(f"{n} after {steps:,}" for steps, n in sorted(where.items())[:4])
        places = places and f"{places} updates" + (" …" if len(where) > 4 else "")
        if policy == "population":
            replaced = sum(row.pruned for row in stopped)
            said += f" {replaced} {'member was' if replaced == 1 else 'members were'} replaced on the way."
        else:
            were = "1 other setting was" if count == 1 else f"{count} other settings were"
            said += f" {were} stopped early" + (f" ({places})" if places else "")
            found = verdicts(stopped)
            only = found.keys() - {"not compared"}
            said += (
                " and compared with it at equal tokens alone: "
                + ", ".join(_STOPPED[verdict].format(n) for verdict, n in found.items())
                + "."
                if only
                else "; they were never compared with it."
                if count > 1
                else "; it was never compared with it."
            )
    left = Counter(fate(row) for row in settings if not (row.pruned and not row.lost))
    for state, one, many in (
        ("diverged", "lost a run to divergence", "lost a run to divergence"),
        ("failed", "failed and has no result", "failed and have no result"),
        ("not finished", "has not finished", "have not finished"),
    ):
        if left[state]:
            said += (
                f" {left[state]} {'setting' if left[state] == 1 else 'settings'} {one if left[state] == 1 else many}."
            )
    return said

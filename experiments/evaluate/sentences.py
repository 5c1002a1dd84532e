"""Say in words and figures what a comparison of models found."""

from collections.abc import Sequence

from experiments.evaluate.compare import BEST, Comparison, Difference, TaskComparison
from experiments.words import counted

EQUAL = "cannot be distinguished"


def sentences(comparison: Comparison) -> list[str]:
    """Return the answer in words: who is better where, and what cannot be distinguished.

    One sentence for each model that is compared with the baseline; where the baseline is "best" one for each task, and
    where protocols are compared one for each pair of them.
    """
    if comparison.baseline is None:
        return [_between_protocols(task, row) for task in comparison.tasks for row in task.differences]
    if comparison.baseline == BEST:
        tasks = zip(task_names(comparison), comparison.tasks, strict=True)
        return [_among_all(name, task) for name, task in tasks if task.differences]
    pairs = dict.fromkeys((row.first, row.second) for row in comparison.differences)
    return [_against_baseline(comparison, first, second) for first, second in pairs]


def task_names(comparison: Comparison) -> list[str]:
    """Return the name of each task, with its protocol where a task occurs under several."""
    found = []
    for task in comparison.tasks:
        protocols = {other.protocol for other in comparison.tasks if other.task == task.task}
        found.append(f"{task.task} ({task.protocol})" if len(protocols) > 1 else task.task)
    return found


def is_share(task: TaskComparison) -> bool:
    """Return whether scores are shares, which are written in per cent and their differences in points."""
    return task.higher_is_better and all(0 <= score.mean.value <= 1 for score in task.scores)


def written(task: TaskComparison, value: float | None) -> str:
    """Write a score: 54.1 for a share of 0.541, else 1.0312."""
    if value is None:
        return "–"
    return (f"{100 * value:.1f}" if is_share(task) else f"{value:.4f}").replace("-", "−")


def written_difference(task: TaskComparison, value: float | None) -> str:
    """Write a difference with its sign: +2.1 points of a share, else +0.0123."""
    if value is None:
        return "–"
    return (f"{100 * value:+.1f}" if is_share(task) else f"{value:+.4f}").replace("-", "−")


def written_p(p: float | None) -> str:
    """Write a p value with two digits, and small ones as < 0.001."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def judged(task: TaskComparison, row: Difference) -> str:
    """Return the verdict of the second model; a protocol is not better but gives higher or lower scores."""
    if task.model is None or row.verdict not in ("better", "worse"):
        return row.verdict
    return "higher" if row.paired.mean > 0 else "lower"


def full_name(task: TaskComparison, name: str) -> str:
    """Return the name of a task from `task_names`, with the model where protocols are compared."""
    return f"{task.model}: {name}" if task.model else name


def described(task: TaskComparison) -> str:
    """Describe a task: metric, number of questions and clusters, protocol, shots, chance."""
    unit = " in %" if is_share(task) else ""
    parts = [f"{task.metric}{unit}", counted(task.questions, "document" if task.is_text else "question")]
    parts += [f"in {task.clusters:,} clusters"] if task.clusters else []
    parts += [f"protocol {task.protocol}"] if task.protocol else []
    parts += [counted(task.shots, "shot")] if task.protocol and task.shots is not None else []
    parts += [f"chance {written(task, task.chance)}"] if task.chance is not None else []
    return ", ".join(parts) + ("" if task.higher_is_better else "; lower is better")


def _against_baseline(comparison: Comparison, first: str, second: str) -> str:
    by_verdict: dict[str, list[str]] = {}
    for name, task in zip(task_names(comparison), comparison.tasks, strict=True):
        for row in task.differences:
            if (row.first, row.second) == (first, second):
                by_verdict.setdefault(row.verdict, []).append(name)
    parts = [
        f"is {word} than {first} on {_list(by_verdict[word])}" for word in ("better", "worse") if word in by_verdict
    ]
    if EQUAL in by_verdict:
        equal = by_verdict[EQUAL]
        where = _list(equal) if parts or len(equal) < 3 else f"any of the {len(equal)} tasks"
        parts.append(f"{EQUAL} from {'it' if parts else first} on {where}")
    if "not compared" in by_verdict:
        parts.append(f"is not compared on {_list(by_verdict['not compared'])}, which has one question or cluster")
    return f"{second} {_list(parts)}."


def _among_all(name: str, task: TaskComparison) -> str:
    score = next(score for score in task.scores if score.name == task.best)
    unit = " %" if is_share(task) else ""
    said = f"{name}: {task.best} has the best {task.metric}, {written(task, score.mean.value)}{unit}"
    equal, others = task.indistinguishable or (), len(task.scores) - 1
    if not equal:
        return f"{said}; {'the other one is' if others == 1 else 'all others are'} worse by more than the noise."
    return f"{said}; {_list(equal)} {EQUAL} from it{'' if len(equal) == others else ', the others are worse'}."


def _between_protocols(task: TaskComparison, row: Difference) -> str:
    where = f"{task.model} on {task.task}"
    if row.verdict == EQUAL:
        return f"{where}: {row.second} {EQUAL} from {row.first}."
    unit = " points" if is_share(task) else ""
    difference = written_difference(task, row.paired.mean)
    return f"{where}: {row.second} gives {difference}{unit} {task.metric} against {row.first}."


def _list(parts: Sequence[str]) -> str:
    """Write a list: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

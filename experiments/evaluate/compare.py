"""Compare models, or protocols, by their answers to the same questions: scores, paired differences, verdicts."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.evaluate.evaluations import Entry, Evaluations, check_same_questions
from experiments.evaluate.statistics.calibration import Calibration, calibrate, choice_probabilities
from experiments.evaluate.statistics.mean import Mean, estimate_mean
from experiments.evaluate.statistics.paired import PairedDifference, Verdict, holm, paired_difference, verdict
from experiments.evaluate.statistics.power import detectable_mean, detectable_share
from experiments.evaluate.summary import bits_per_byte_of
from model.errors import InputError, UnknownNameError
from train.clusters import cluster_ids

BEST = "best"
TEXT_METRIC = "bits_per_byte"
LOWER_IS_BETTER = frozenset({TEXT_METRIC, "bits_per_token", "loss", "nats", "perplexity", "brier", "ece"})


@dataclass(frozen=True)
class Score:
    """The mean score of a model, or of a protocol where protocols are compared."""

    name: str
    mean: Mean
    calibration: Calibration | None
    """None unless the answers have log-probabilities of choices."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        calibration = None if self.calibration is None else asdict(self.calibration)
        return {"name": self.name} | asdict(self.mean) | {"calibration": calibration}


@dataclass(frozen=True)
class Difference:
    """The paired difference of two models or protocols, second minus first."""

    first: str
    second: str
    paired: PairedDifference
    adjusted_p: float | None
    """p by Holm's method over all comparisons of the document, or over the domains of a text."""
    verdict: Verdict
    """The verdict on the second model."""
    detectable: float | None
    """The smallest true difference that these questions show with 80 % probability, by the observed variation."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"first": self.first, "second": self.second} | asdict(self.paired) | {
            "adjusted_p": self.adjusted_p, "verdict": self.verdict, "detectable": self.detectable
        }  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """One domain of a text task."""

    name: str
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class TaskComparison:
    """The scores and differences of one task, under one metric."""

    task: str
    protocol: str | None
    """None where protocols are compared."""
    shots: int | None
    """Shots of the task; of the first protocol where protocols are compared."""
    model: str | None
    """The model whose protocols are compared; None where models are."""
    metric: str
    chance: float | None
    higher_is_better: bool
    questions: int
    """Number of questions; of documents for a text."""
    clusters: int | None
    """None: the questions count as independent."""
    is_text: bool
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    best: str
    indistinguishable: tuple[str, ...] | None
    """Those that cannot be distinguished from the best; None where not all were compared with it."""
    domains: tuple[Domain, ...]

    @property
    def detectable(self) -> float | None:
        """The largest of the smallest detectable differences of the task's comparisons: its noise floor."""
        return max((row.detectable for row in self.differences if row.detectable is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("scores", "differences", "domains")}
        return plain | _listed(self) | {
            "detectable": self.detectable,
            "domains": [{"name": domain.name} | _listed(domain) for domain in self.domains],
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All tasks of a comparison."""

    baseline: str | None
    """A model, "best", or None where protocols are compared."""
    models: tuple[str, ...]
    tasks: tuple[TaskComparison, ...]
    left_out: tuple[str, ...]
    """Sentences that say what could not be compared, and why."""

    @property
    def differences(self) -> tuple[Difference, ...]:
        """All comparisons; p values are adjusted over them."""
        return tuple(row for task in self.tasks for row in task.differences)

    def reference(self, task: TaskComparison) -> str:
        """Return the model or protocol with which the others are compared on a task."""
        if self.baseline is None:
            return task.scores[0].name
        return task.best if self.baseline == BEST else self.baseline

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "baseline": self.baseline,
            "models": list(self.models),
            "comparisons": len(self.differences),
            "tasks": [task.to_dict() for task in self.tasks],
            "left_out": list(self.left_out),
        }


def compare(
    evaluations: Evaluations, *, baseline: str | None = None, metric: str | None = None, protocols: bool = False
) -> Comparison:
    """Compare all models on every task that at least two of them answered.

    baseline: the model with which the others are compared, by default the first; "best": all pairs of models are
    compared, among them each task's best with the others. metric: by default the one that a task quotes. protocols:
    compare the protocols of each model, on the questions that they share, instead of models. p values are adjusted over
    all comparisons together. Raises `InputError` if there is nothing to compare or prompts differ, `UnknownNameError`
    for an unknown model or metric.
    """
    known = dict.fromkeys(name for entry in evaluations.entries for name in entry.metrics)
    if metric is not None and metric not in known:
        raise UnknownNameError("metric", metric, known, guess=False)
    if baseline is not None and baseline not in (*evaluations.models, BEST):
        raise UnknownNameError("model", baseline, (*evaluations.models, BEST), guess=False)
    if protocols:
        return _compare_protocols(evaluations, metric)
    models = evaluations.models
    if len(models) < 2:
        raise InputError(
            f"{evaluations.folder} has answers of {models[0]} alone; evaluate another model with "
            f"isoflop eval MODEL --out {evaluations.folder}, or compare protocols with --protocols"
        )
    baseline = baseline or models[0]
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in evaluations.entries:
        groups.setdefault((entry.task, entry.protocol), []).append(entry)
    tasks, left_out = [], []
    for (task, protocol), entries in groups.items():
        name = f"{task} ({protocol})"
        chosen = metric or str(entries[0].answers.header["metric"])
        if lacking := [entry.model for entry in entries if chosen not in entry.metrics]:
            left_out.append(f"{name} has no {chosen} of {', '.join(lacking)}.")
            continue
        absent = [model for model in models if model not in {entry.model for entry in entries}]
        if absent:
            left_out.append(f"{', '.join(absent)} did not answer {name}.")
        check_same_questions(name, entries)
        ordered = {entry.model: entry for entry in sorted(entries, key=lambda entry: models.index(entry.model))}
        tasks.append(replace(_compare_task(ordered, chosen, baseline), protocol=protocol))
    if not tasks:
        raise InputError(f"{evaluations.folder} has nothing to compare: {' '.join(left_out)} Name another --metric")
    return Comparison(baseline, models, tuple(_with_verdicts(tasks)), tuple(left_out))


def _compare_protocols(evaluations: Evaluations, metric: str | None) -> Comparison:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in evaluations.entries:
        groups.setdefault((entry.model, entry.task), []).append(entry)
    tasks, left_out = [], []
    for (model, task), entries in groups.items():
        shared = set.intersection(*(set(entry.ids) for entry in entries))
        chosen = metric or str(entries[0].answers.header["metric"])
        if len(entries) < 2:
            left_out.append(f"{model} answered {task} under {entries[0].protocol} alone.")
        elif not shared:
            left_out.append(f"The protocols of {task} share no question.")
        elif lacking := [entry.protocol for entry in entries if chosen not in entry.metrics]:
            left_out.append(f"{task} has no {chosen} under {', '.join(lacking)}.")
        else:
            named = {entry.protocol: _restricted(entry, shared) for entry in entries}
            tasks.append(replace(_compare_task(named, chosen, entries[0].protocol), model=model))
    if not tasks:
        raise InputError(
            f"{evaluations.folder} has no task that a model answered under two protocols on the same questions; "
            "evaluate one under another protocol into the same folder"
        )
    return Comparison(None, evaluations.models, tuple(_with_verdicts(tasks)), tuple(left_out))


def _restricted(entry: Entry, ids: set[str]) -> Entry:
    """Return the entry with the answers to these questions alone, ordered by id."""
    rows = [row for row in entry.answers.rows if str(row["id"]) in ids]
    return replace(entry, answers=replace(entry.answers, rows=sorted(rows, key=lambda row: str(row["id"]))))


def _compare_task(entries: Mapping[str, Entry], chosen: str, baseline: str) -> TaskComparison:
    """Compare entries by the chosen metric, with the same questions in the same order; verdicts are not corrected."""
    first = next(iter(entries.values())).answers
    quoted = str(first.header["metric"])
    higher = chosen not in LOWER_IS_BETTER
    rows = {name: entry.answers.rows for name, entry in entries.items()}
    is_text = chosen == TEXT_METRIC and "nats" in first.rows[0]
    places = [str(row.get("cluster") or "") for row in first.rows]
    clusters = None if is_text else cluster_ids(places)  # the domains of a text are chosen, not drawn
    values = {name: _values(each, chosen, is_text) for name, each in rows.items()}
    scores = tuple(
        Score(name, estimate_mean(each, clusters), None if is_text else _calibration(rows[name]))
        for name, each in values.items()
    )
    best = (max if higher else min)(scores, key=lambda score: score.mean.value).name
    return TaskComparison(
        task=next(iter(entries.values())).task,
        protocol=None,
        shots=first.header.get("shots"),
        model=None,
        metric=chosen,
        chance=first.header.get("chance") if chosen == quoted else None,
        higher_is_better=higher,
        questions=len(first.rows),
        clusters=None if clusters is None else len(np.unique(clusters)),
        is_text=is_text,
        scores=scores,
        differences=_differences(values, clusters, baseline, higher),
        best=best,
        indistinguishable=None,
        domains=_domains(rows, places, best if baseline == BEST else baseline) if is_text else (),
    )


def _values(rows: Sequence[Mapping[str, Any]], metric: str, is_text: bool) -> Float[np.ndarray, " questions"]:
    """Return values whose mean is the score."""
    return bits_per_byte_of(rows) if is_text else np.array([row["metrics"][metric] for row in rows], float)


def _calibration(rows: Sequence[Mapping[str, Any]]) -> Calibration | None:
    if not all(len(row.get("logprobs") or ()) > 1 and row.get("gold") for row in rows):
        return None
    return calibrate([choice_probabilities(row["logprobs"]) for row in rows], [row["gold"] for row in rows])


def _differences(
    values: Mapping[str, np.ndarray], clusters: Int[np.ndarray, " questions"] | None, baseline: str, higher: bool
) -> tuple[Difference, ...]:
    """Compare all with the baseline, the first of each pair; for "best" all pairs, in which the better one is first."""
    if baseline == BEST:
        ordered = sorted(values, key=lambda name: float(values[name].mean()), reverse=higher)
        pairs = list(itertools.combinations(ordered, 2))
    else:
        pairs = [(baseline, name) for name in values if baseline in values and name != baseline]
    found = []
    for first, second in pairs:
        paired = paired_difference(values[first], values[second], clusters)
        found.append(Difference(first, second, paired, None, "not compared", _detectable(paired)))
    return tuple(found)


def _detectable(paired: PairedDifference) -> float | None:
    if paired.standard_error is None or paired.freedom is None:
        return None
    if paired.test == "mcnemar" and paired.only_first is not None and paired.only_second is not None:
        return detectable_share(paired.questions, (paired.only_first + paired.only_second) / paired.questions)
    return detectable_mean(paired.standard_error, paired.freedom)


def _domains(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], places: Sequence[str], baseline: str
) -> tuple[Domain, ...]:
    """Return the domains of a text if there are several; their p values are adjusted over them alone."""
    found = []
    for name in dict.fromkeys(places):
        inside = [index for index, place in enumerate(places) if place == name]
        values = {who: _values([each[index] for index in inside], TEXT_METRIC, True) for who, each in rows.items()}
        scores = tuple(Score(who, estimate_mean(each), None) for who, each in values.items())
        found.append(Domain(name, scores, _differences(values, None, baseline, False)))
    if len(found) < 2:
        return ()
    corrected = _corrected([domain.differences for domain in found], [False] * len(found))
    return tuple(replace(domain, differences=rows) for domain, rows in zip(found, corrected, strict=True))


def _corrected(
    groups: Sequence[Sequence[Difference]], higher_is_better: Sequence[bool]
) -> list[tuple[Difference, ...]]:
    """Return the groups with p adjusted over all of them, and the verdicts that follow."""
    adjusted = iter(holm([row.paired.p for rows in groups for row in rows]))
    found = []
    for rows, higher in zip(groups, higher_is_better, strict=True):
        with_p = [replace(row, adjusted_p=next(adjusted)) for row in rows]
        found.append(tuple(replace(row, verdict=verdict(row.paired.mean, row.adjusted_p, higher)) for row in with_p))
    return found


def _with_verdicts(tasks: Sequence[TaskComparison]) -> list[TaskComparison]:
    """Return the tasks with corrected verdicts, and with the names that cannot be distinguished from each best."""
    corrected = _corrected([task.differences for task in tasks], [task.higher_is_better for task in tasks])
    found = []
    for task, rows in zip(tasks, corrected, strict=True):
        with_best = [row for row in rows if task.best in (row.first, row.second)]
        equal = [row for row in with_best if row.verdict == "cannot be distinguished"]
        names = tuple(row.first if row.second == task.best else row.second for row in equal)
        known = len(with_best) == len(task.scores) - 1
        found.append(replace(task, differences=rows, indistinguishable=names if known else None))
    return found


def _listed(compared: TaskComparison | Domain) -> dict[str, Any]:
    return {
        "scores": [score.to_dict() for score in compared.scores],
        "differences": [row.to_dict() for row in compared.differences],
    }

"""Implement `isoflop sweep run`, `resume`, `status` and `worker`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.commands.options import BasePath, JsonFile
from experiments.commands.sweep.options import ONE_WORKER, Options, WorkerOptions, Workers
from experiments.words import counted

if TYPE_CHECKING:
    from rich.table import Table

    from experiments.sweep.analysis.executions import ExecutionComparison
    from experiments.sweep.analysis.outcome import Summary
    from experiments.sweep.analysis.pareto import ParetoFront
    from experiments.sweep.ledger import Ledger
    from experiments.sweep.live import Standing
    from experiments.sweep.record import Sweep

_SHOWN = 12


def run(
    options: Options,
    *,
    workers: Workers = ONE_WORKER,
    dry_run: bool = False,
    json: JsonFile = None,
) -> None:
    """Train every trial of a sweep as a lane of one program per static shape; the same command resumes it.

    Example: isoflop sweep run study-24 --data data/sotu --out sweeps/lr --steps 200
    --set learning_rate=logspace:1e-3:1e-1:5 num_layers=2,4 --seeds 3

    Example: isoflop sweep run runs/first --data data/sotu --out sweeps/lora --steps 100 --lora 8
    --set lora_rank=2,4,8 learning_rate=3e-3,1e-2 --lanes 3

    Example: isoflop sweep run runs/sft --tune dpo --data data/pairs --out sweeps/dpo --steps 100 --lora 8
    --set beta=0.03,0.1,0.3,1 learning_rate=1e-6,3e-6,1e-5 --objective accuracy --seeds 2

    Args:
        dry_run: Print what would run, what it costs and needs, and stop.
        json: Also write the summary to this file.
    """
    from experiments.sweep.run import begin

    if dry_run:
        from experiments.commands.sweep.plan import plan as show_plan

        show_plan(options, json=json)
        return
    sweep = options.define()
    if tuning := options.tuning():
        tuning.keep_reference()
    _work(sweep, begin(sweep, workers.heartbeat, workers.grace), workers, json)


def resume(
    folder: tyro.conf.Positional[Path],
    *,
    retry_failed: bool = False,
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    base: BasePath = None,
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    new_id: bool = False,
    workers: Workers = ONE_WORKER,
    json: JsonFile = None,
) -> None:
    """Resume a sweep as it was defined, also after its folder was moved.

    Example: isoflop sweep resume sweeps/lr --retry-failed

    Args:
        folder: The folder of the sweep.
        retry_failed: Retry the trials that an exception ended.
        data: The new folder of the sweep's data, if they were moved.
        base: The new path of the model that the trials start from, if it was moved.
        storage: The new address of the sweep's storage, if it was moved.
        new_id: Make a copied folder a sweep of its own, in the same storage, with the results of its runs.
        json: Also write the summary to this file.
    """
    from experiments.sweep.checks import check_data, check_weights
    from experiments.sweep.record import Sweep
    from experiments.sweep.run import begin, separate, with_places

    sweep = with_places(Sweep.read(folder), data, storage, base)
    check_data(sweep)
    check_weights(sweep)
    if new_id:
        sweep = separate(sweep)
    ledger = begin(sweep, workers.heartbeat, workers.grace)
    if retry_failed:
        print(f"{ledger.retry()} failed trials are planned again", file=sys.stderr)
    _work(sweep, ledger, workers, json)


def status(folder: tyro.conf.Positional[Path], *, watch: bool = False, json: JsonFile = None) -> None:
    """Show the state of a sweep: its cohorts, the best so far with its noise, the remaining work.

    Example: isoflop sweep status sweeps/lr --watch

    Args:
        folder: The folder of the sweep.
        watch: Update until the sweep is done.
        json: Also write it to this file.
    """
    from experiments.commands.options import console, write_document
    from experiments.sweep import live
    from experiments.sweep.analysis.results import read_results, record_troubles
    from experiments.sweep.ledger import Ledger
    from experiments.sweep.record import Sweep

    sweep = Sweep.read(folder)
    ledger = Ledger(sweep, read_only=True)

    def look() -> live.Standing:
        return live.standing(sweep, ledger.rows(), ledger.asked())

    if watch:
        live.watch(look)
    now, warnings = look(), record_troubles(read_results(sweep.folder))
    write_document(json, now.to_dict() | {"warnings": warnings})
    console().print(live.table(now))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def worker(
    folder: tyro.conf.Positional[Path],
    *,
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    base: BasePath = None,
    heartbeat: int = 15,
    grace: int = 90,
) -> None:
    """Run one worker of a sweep, as --workers and --launcher do; any number may run, on any machine.

    Example: isoflop sweep worker sweeps/lr

    Args:
        folder: The folder of the sweep, as this machine sees it.
        data: The sweep's data, if their path differs on this machine.
        base: The model that its trials start from, if its path differs on this machine.
        heartbeat: Seconds between its heartbeats.
        grace: Seconds without a heartbeat after which another worker counts as dead.
    """
    from experiments.sweep.checks import check_data, check_weights
    from experiments.sweep.ledger import Ledger
    from experiments.sweep.record import Sweep
    from experiments.sweep.run import with_places
    from experiments.sweep.worker import work

    sweep = with_places(Sweep.read(folder), data, weights=base)
    check_data(sweep)
    check_weights(sweep)
    ledger = Ledger(sweep, interval=heartbeat, grace=grace)
    work(sweep, ledger)
    _stop_at_failures(ledger)


def _work(sweep: "Sweep", ledger: "Ledger", asked: WorkerOptions, json: Path | None) -> None:
    """Train the sweep here or with other workers, then print its result."""
    from experiments.commands.options import say_unused
    from experiments.inputs import read_changes
    from experiments.sweep import launch
    from experiments.sweep.run import useful_workers, work_through

    if asked.launcher != "slurm":
        say_unused("without --launcher slurm", WorkerOptions, slurm_set=asked.slurm_set)
    count = useful_workers(sweep, ledger, asked.workers)
    started: launch.Workers | None = None
    options = ("--heartbeat", str(ledger.storage.interval), "--grace", str(ledger.storage.grace))
    if asked.launcher == "slurm":
        started = launch.SlurmWorkers(sweep.folder, max(1, count), read_changes(asked.slurm_set), options)
    elif count > 0:
        started = launch.LocalWorkers(sweep.folder, count, options)
    said = work_through(sweep, ledger, started)
    outcome = _outcome(sweep, ledger)
    _write(sweep, outcome, json)
    show(outcome)
    print(f"`isoflop sweep report {sweep.folder}` draws it", file=sys.stderr)
    for sentence in said:
        print(f"isoflop: {sentence}", file=sys.stderr)
    _stop_at_failures(ledger)
    if not outcome.standing.done:
        print("isoflop: the workers ended before the sweep; `isoflop sweep resume` continues", file=sys.stderr)
        sys.exit(1)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The summary of a sweep, and its state."""

    summary: "Summary"
    policy: str
    unit: str
    standing: "Standing"
    front: "ParetoFront | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        about = {"policy": self.policy, "unit": self.unit, "standing": self.standing.to_dict()}
        about |= {} if self.front is None else {"pareto": self.front.to_dict()}
        return self.summary.to_dict() | about


def _outcome(sweep: "Sweep", ledger: "Ledger") -> _Outcome:
    from experiments.sweep.analysis.executions import with_shared_losses
    from experiments.sweep.analysis.pareto import pareto
    from experiments.sweep.analysis.results import read_results, record_troubles
    from experiments.sweep.analysis.summary import summarize
    from experiments.sweep.live import standing

    results = read_results(sweep.folder)
    summary = summarize(results.axes, results.rows, results.executions, results.objectives)
    summary = dataclasses.replace(summary, warnings=[*summary.warnings, *record_troubles(results)])
    front = pareto([*results.axes, *results.executions], with_shared_losses(results.rows), results.objectives)
    return _Outcome(summary, sweep.policy, results.unit, standing(sweep, ledger.rows(), ledger.asked()), front)


def _write(sweep: "Sweep", outcome: _Outcome, json: Path | None) -> None:
    from experiments.commands.options import write_document
    from train.files import write_json

    document = outcome.to_dict()
    write_json(sweep.folder / "summary.json", document)
    write_document(json, document)


def _stop_at_failures(ledger: "Ledger") -> None:
    failed = [row for row in ledger.rows() if row.state == "failed"]
    if failed:
        print(
            f"isoflop: {counted(len(failed), 'trial')} failed, the first by {failed[0].facts['reason']}; "
            "`isoflop sweep resume --retry-failed` tries them again",
            file=sys.stderr,
        )
        sys.exit(1)


def show(outcome: _Outcome) -> None:
    """Print the settings, best first, and the warnings."""
    from experiments.commands.options import console, new_table
    from experiments.sweep.analysis.scales import text
    from experiments.sweep.analysis.sentence import sentence
    from experiments.sweep.analysis.summary import fate

    summary, standing = outcome.summary, outcome.standing
    out, names = console(), list(summary.axes)
    states = ", ".join(f"{count} {name}" for name, count in standing.states.items() if count)
    ranked, title = summary.ranking, f"{standing.folder}: {states or 'no trials'}"
    table = new_table(*names, ranked.words, "± seeds", "not at the end", title=title)
    order = sorted(summary.settings, key=lambda row: (bool(fate(row)), row.mean is None, ranked.cost(row.mean or 0)))
    for row in order[:_SHOWN]:
        spread = "" if row.std is None else f"{row.std:.4f}"
        mean = "–" if row.mean is None else f"{row.mean:.4f}"
        values = (f"{value:.4g}" if isinstance(value, float) else text(value) for value in row.values.values())
        table.add_row(*values, mean, spread, fate(row))
    out.print(table)
    if len(order) > _SHOWN:
        out.print(f"and {len(order) - _SHOWN} more in {standing.folder}/summary.json", highlight=False)
    if summary.executions is not None:
        out.print(_speeds(summary.executions))
    if outcome.front is not None:
        out.print(_front(outcome.front))
    if summary.seed_noise is not None:
        unit = " nats" if ranked.by_loss else f" of {ranked.words}"
        out.print(f"seed noise of one run: {summary.seed_noise:.4f}{unit}", highlight=False)
    out.print(sentence(summary, outcome.policy, outcome.unit), highlight=False)
    for warning in summary.warnings:
        out.print(f"warning: {warning}", style="yellow", highlight=False)


def _front(found: "ParetoFront") -> "Table":
    """Return the means of all objectives with their standard errors, the settings on the Pareto front first."""
    from experiments.commands.options import new_table
    from experiments.sweep.analysis.scales import text

    names = list(found.settings[0].setting)
    table = new_table(*names, *found.objectives, "Pareto front")
    order = {"front": 0, "near": 1, "behind": 2}
    for row in sorted(found.settings, key=lambda row: order[row.place])[:_SHOWN]:
        values = ("auto" if value is None else text(value) for value in row.setting.values())
        means = [
            f"{value:.5g}" + (f" ± {error:.2g}" if error else "")
            for value, error in zip(row.values, row.errors, strict=True)
        ]
        table.add_row(*values, *means, {"front": "on it", "near": "within noise", "behind": "behind"}[row.place])
    return table


def _speeds(found: "ExecutionComparison") -> "Table":
    """Return the speed of every execution, the fastest first."""
    from experiments.commands.options import new_table
    from experiments.sweep.analysis.scales import text

    table = new_table(*found.axes, "trials", "training tokens/s", "± trials", "of the fastest")
    for row in found.executions[:_SHOWN]:
        values = ("auto" if value is None else text(value) for value in row.execution.values())
        speed, spread, ratio = row.tokens_per_second, row.std, row.ratio
        numbers = (f"{speed:,.0f}" if speed else "–", "" if spread is None else f"{spread:,.0f}")
        table.add_row(*values, str(row.trials), *numbers, "" if ratio is None else f"{ratio:.2f}")
    return table

"""Run hundreds of simulated trials on several processes, and resume after a stop."""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_trials(
    jobs: Sequence[tuple[Any, ...]],
    work: Callable[[tuple[Any, ...]], Any],
    processes: int = 1,
    ledger: Path | None = None,
    advance: Callable[..., None] | None = None,
) -> dict[tuple[Any, ...], Any]:
    """Return `{job: work(job)}`, calling `advance()` after each; jobs are tuples and results values that JSON can hold.

    Finished jobs are recorded in the `ledger`, one line of JSON each, and are not run again.
    """
    done: dict[tuple[Any, ...], Any] = {}
    if ledger is not None and ledger.exists():
        for line in ledger.read_text(encoding="utf-8").splitlines():
            *job, result = json.loads(line)
            done[tuple(job)] = result
    left = [job for job in jobs if job not in done]

    def collect(results: Any) -> None:
        for job, result in zip(left, results, strict=True):
            done[job] = result
            if ledger is not None:
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*job, result]) + "\n")
            if advance is not None:
                advance()

    if advance is not None and len(left) < len(jobs):
        advance(len(jobs) - len(left))
    if processes == 1:
        collect(map(work, left))
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            collect(pool.imap(work, left, chunksize=4))
    return done


def main(
    description: str,
    study: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    *,
    name: str,
    seeds: int,
    bootstraps: int,
    jobs_per_seed: int,
    processes: int = 1,
) -> None:
    """Run a study of simulated tables from the command line: print the summary that `show` makes of its document.

    study(seeds, bootstraps, processes, ledger, advance) returns the document; seeds, bootstraps, processes:
    defaults.
    """
    from train.progress import progress_bar

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="tables of each kind")
    parser.add_argument("--bootstraps", type=int, default=bootstraps, help="resamples behind each interval")
    parser.add_argument("--processes", type=int, default=processes)
    parser.add_argument("--json", type=Path, default=None, help="write the document to this file")
    parser.add_argument("--ledger", type=Path, default=None, help="keep every trial here, to resume after a stop")
    options = parser.parse_args()
    with progress_bar(name, options.seeds * jobs_per_seed) as advance:
        document = study(options.seeds, options.bootstraps, options.processes, options.ledger, advance)
    print(show(document))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

"""Start workers besides this process: several on this machine, or as jobs of a cluster; all run the same program."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from model.errors import InputError

_PATIENCE_SECONDS = 120.0


class Workers(Protocol):
    """Workers that were started."""

    def going(self) -> bool:
        """Return whether any of them is still running."""
        ...

    def stop(self) -> None:
        """Ask the workers to save, release their claims and end; wait for it."""
        ...

    def failures(self) -> list[str]:
        """Return one sentence for each worker that failed."""
        ...


def worker_command(folder: Path, options: Sequence[str] = ()) -> list[str]:
    """Return the command line of a worker: `isoflop sweep worker FOLDER`, with this Python."""
    return [sys.executable, "-m", "experiments.cli", "sweep", "worker", str(folder.resolve()), *options]


class LocalWorkers:
    """Worker processes on this machine; their output goes to `FOLDER/workers/NUMBER.log`."""

    def __init__(self, folder: Path, count: int, options: Sequence[str] = ()):
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self.logs = [folder / "workers" / f"{number}.log" for number in range(1, count + 1)]
        self.processes = [_start(worker_command(folder, options), log) for log in self.logs]

    def going(self) -> bool:
        """Return whether any of them is still running."""
        return any(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL to a worker that has not saved its state after two minutes."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _PATIENCE_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def failures(self) -> list[str]:
        """Return a sentence for each worker whose exit code is neither 0 nor 1 (which failed trials give)."""
        return [
            f"a worker ended with code {process.returncode}; its last words are in {log}"
            for process, log in zip(self.processes, self.logs, strict=True)
            if process.poll() not in (None, 0, 1)
        ]


class SlurmWorkers:
    """Jobs of a Slurm cluster, through submitit. settings: of its `update_parameters`, such as slurm_partition.

    Raises InputError if submitit is not installed, Slurm is not there, or it refuses the job.
    """

    def __init__(self, folder: Path, count: int, settings: Mapping[str, Any], options: Sequence[str] = ()):
        try:
            import submitit
        except ImportError:
            raise InputError(
                "--launcher slurm needs submitit; install the extra: pip install 'isoflop[cluster]'"
            ) from None
        self.folder = folder / "workers"
        try:
            executor = submitit.SlurmExecutor(folder=self.folder / "%j", python=sys.executable)
            executor.update_parameters(
                **{"job_name": f"sweep-{folder.resolve().name}", "time": 24 * 60} | dict(settings)
            )
            work = submitit.helpers.CommandFunction(worker_command(folder, options))
            with executor.batch():
                self.jobs = [executor.submit(work) for _ in range(count)]
        except (RuntimeError, ValueError, TypeError, OSError, submitit.core.utils.FailedJobError) as error:
            words = " ".join(str(error).split())
            raise InputError(f"Slurm cannot start the workers: {words}") from None

    def going(self) -> bool:
        """Return whether any of them is pending or running, by `squeue`, as accounting is not set up everywhere."""
        if all(job.paths.result_pickle.exists() for job in self.jobs):
            return False
        names = ",".join(job.job_id for job in self.jobs)
        asked = subprocess.run(["squeue", "--noheader", "--jobs", names], capture_output=True, text=True)
        if asked.returncode:  # finished jobs are unknown to it; a controller that does not answer may recover
            return "Invalid job id" not in asked.stderr
        return bool(asked.stdout.strip())

    def stop(self) -> None:
        """Call `scancel`: Slurm sends SIGTERM, and SIGKILL after its KillWait."""
        for job in self.jobs:
            job.cancel(check=False)

    def failures(self) -> list[str]:
        """Return a sentence for each job that failed or ended without a message."""
        return [
            f"job {job.job_id} ended badly; see {job.paths.stderr}"
            for job in self.jobs
            if not job.paths.result_pickle.exists() or job.exception() is not None
        ]


def follow(workers: Workers, show: Callable[[Callable[[], bool]], None]) -> list[str]:
    """Show the sweep's progress until the workers are done, and return their failures; Ctrl-C stops them."""
    try:
        show(workers.going)
        while workers.going():  # the sweep is done: the workers will notice soon
            time.sleep(0.2)
    except BaseException:
        workers.stop()
        raise
    return workers.failures()


def _start(command: list[str], log: Path) -> subprocess.Popen:
    # In a session of its own a worker receives Ctrl-C only through its launcher.
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=os.environ)

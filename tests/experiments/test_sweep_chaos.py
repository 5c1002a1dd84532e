"""Workers killed at random, a database that restarts: every trial is finished once, to the bit as without them."""

import collections
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from experiments.sweep.definition import define
from experiments.sweep.launch import worker_command
from experiments.sweep.ledger import Ledger
from experiments.sweep.worker import plan, work
from model import presets

TRIALS = 40
WORKER = ("--heartbeat", "1", "--grace", "3")


class PostgreSQL:
    """A server of its own, in a temporary folder, on a free port of this machine."""

    def __init__(self, programs: Path):
        self.programs, self.folder = programs, Path(tempfile.mkdtemp(prefix="isoflop-postgres-"))
        self.user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
        if self.user:
            shutil.chown(self.folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._call("initdb", "-D", str(self.folder / "data"), "-A", "trust", "-U", "isoflop", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://isoflop@127.0.0.1:{self.port}/postgres"

    def start(self):
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = str(self.folder / "log")
        self._call("pg_ctl", "start", "-w", "-D", str(self.folder / "data"), "-l", log, "-o", options)

    def stop(self):
        self._call("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self.folder / "data"))

    def _call(self, program, *arguments):
        command = [str(self.programs / program), *arguments]
        quiet = subprocess.DEVNULL
        subprocess.run(command, user=self.user, check=True, stdin=quiet, stdout=quiet, cwd=self.folder)


@pytest.fixture
def postgresql():
    pytest.importorskip("psycopg", reason="the extra `cluster` is not installed")
    found = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    programs = [Path(path).parent for path in found if path]
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    server = PostgreSQL(programs[-1])
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop()
    shutil.rmtree(server.folder)


def define_sweep(folder, data, storage=None):
    sweep = define(
        presets.get("tiny").replace(max_seq_len=32, rope_base=9_100.0),
        data=data,
        folder=folder,
        steps=40,
        axes=("learning_rate=logspace:1e-3:1e-1:10", "beta2=0.9,0.99"),
        seeds=2,
        batch_size=4,
        seq_len=32,
        storage=storage,
        lanes=2,
        evaluate_tokens=512,
    )
    sweep.write()
    return sweep


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The losses of the sweep when nothing happens."""
    sweep = define_sweep(tmp_path_factory.mktemp("undisturbed") / "sweep", data)
    ledger = Ledger(sweep)
    assert plan(sweep, ledger) == TRIALS
    work(sweep, ledger)
    return {row.trial.id: row.values for row in ledger.rows()}


class MortalWorkers:
    """Workers of one sweep, of which one dies now and then and is replaced."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.log = folder, open(folder / "workers.log", "ab")  # noqa: SIM115 – as long as the workers
        self.processes = [self._start() for _ in range(count)]
        self.killed = 0

    def _start(self):
        command = worker_command(self.folder, WORKER)
        return subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True)

    def kill_one(self, chance: random.Random):
        index = chance.randrange(len(self.processes))
        process = self.processes[index]
        if process.poll() is None:
            process.kill()
            process.wait()
            self.killed += 1
        self.processes[index] = self._start()

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(120)
        self.log.close()


def torment(sweep, ledger, workers, *, every, disturb=None):
    """Kill whenever so many trials more have finished (from … to, drawn), until all have; disturb() after a third."""
    chance, deadline = random.Random(0), time.monotonic() + 1500
    due = 0
    try:
        while True:
            time.sleep(chance.uniform(0.2, 0.6))  # so that a kill falls anywhere within a trial
            states = collections.Counter(row.state for row in ledger.rows())
            if states["finished"] == TRIALS:
                return
            assert time.monotonic() < deadline, (states, (sweep.folder / "workers.log").read_text()[-3000:])
            assert not states["failed"], [row.facts for row in ledger.rows() if row.state == "failed"]
            if disturb is not None and states["finished"] >= TRIALS // 3:
                disturb()
                disturb = None
            if states["finished"] >= due:
                workers.kill_one(chance)
                due = states["finished"] + chance.randint(*every)
    finally:
        workers.stop()


def check(ledger, undisturbed):
    finished = [t.user_attrs["id"] for t in ledger.storage.trials() if t.state.name == "COMPLETE"]
    assert sorted(finished) == sorted(undisturbed)  # each once, none lost
    assert {row.trial.id: row.values for row in ledger.rows()} == undisturbed


@pytest.mark.long
def test_workers_are_killed_and_the_database_restarts(postgresql, data, undisturbed, tmp_path):
    sweep = define_sweep(tmp_path / "sweep", data, postgresql.url)
    ledger = Ledger(sweep, interval=1, grace=3)
    plan(sweep, ledger)
    workers = MortalWorkers(sweep.folder, 3)

    def restart():
        postgresql.stop()
        time.sleep(2)
        postgresql.start()

    torment(sweep, ledger, workers, every=(1, 5), disturb=restart)
    assert workers.killed > 3
    check(ledger, undisturbed)


@pytest.mark.long
def test_the_one_worker_of_a_file_is_killed(data, undisturbed, tmp_path):
    sweep = define_sweep(tmp_path / "sweep", data)
    ledger = Ledger(sweep, interval=1, grace=3)
    plan(sweep, ledger)
    workers = MortalWorkers(sweep.folder, 1)
    torment(sweep, ledger, workers, every=(3, 9))
    assert workers.killed > 1
    check(ledger, undisturbed)

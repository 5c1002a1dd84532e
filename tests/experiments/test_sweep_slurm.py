"""A sweep on a real Slurm of one node, started for the test."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from experiments.sweep.ledger import Ledger
from experiments.sweep.record import Sweep

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def slurm(monkeypatch):
    """A controller and one node, with their own key, ports and folders; SLURM_CONF points to them."""
    pytest.importorskip("submitit", reason="the extra `cluster` is not installed")
    missing = [name for name in PROGRAMS if shutil.which(name, path="/usr/sbin:/usr/bin:" + os.environ["PATH"]) is None]
    if missing or os.geteuid() != 0:
        pytest.skip("no root" if not missing else f"{', '.join(missing)} not installed (Debian's slurm-wlm and munge)")
    folder = Path(tempfile.mkdtemp(prefix="isoflop-slurm-", dir="/var/tmp"))
    folder.chmod(0o755)
    munge, host, processes = folder / "munge", socket.gethostname(), []
    munge.mkdir()
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o600)
    for path in (munge, munge / "key"):
        shutil.chown(path, "munge", "munge")
    munge.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=isoflop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CredType=cred/munge
CryptoType=crypto/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES OverSubscribe=YES MaxTime=INFINITE State=UP
"""
    )
    monkeypatch.setenv("SLURM_CONF", str(config))
    monkeypatch.setenv("PATH", "/usr/sbin:/usr/bin:" + os.environ["PATH"])

    def start(*command, user=None):
        with (folder / f"{command[0]}.out").open("wb") as out:
            processes.append(subprocess.Popen(command, stdout=out, stderr=out, user=user, start_new_session=True))

    try:
        own = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid"]
        own += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        start("munged", "--foreground", "--force", *own, user="munge")
        time.sleep(1)
        start("slurmctld", "-D", "-f", str(config))
        start("slurmd", "-D", "-f", str(config))
        deadline = time.monotonic() + 60
        while subprocess.run(["srun", "-n1", "true"], capture_output=True, timeout=60).returncode:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(1)
        yield folder
        deadline = time.monotonic() + 30
        while subprocess.run(["squeue", "--noheader", "--states=R,CG,PD"], capture_output=True).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(1)  # the steps' keepers take their leave
    finally:
        for process in reversed(processes):  # the key's keeper last: the others take leave of one another
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def isoflop(*arguments):
    command = [sys.executable, "-m", "experiments.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_workers_on_slurm_finish_a_sweep(slurm, data, tmp_path):
    storage = f"journal:{tmp_path / 'journal.log'}"
    code, out, err = isoflop(
        *("sweep", "run", "tiny", "--data", data, "--out", tmp_path / "sweep", "--steps", 10, "--seq-len", 32),
        *("--batch-size", 4, "--set", "learning_rate=1e-3,1e-2", "num_layers=1,2", "--seeds", 2, "--lanes", 2),
        *("--eval-tokens", 512, "--storage", storage, "--launcher", "slurm", "--workers", 2),
        *("--slurm-set", "cpus_per_task=1", "partition=all"),
    )
    assert code == 0, err
    assert "8 finished" in out
    rows = Ledger(Sweep.read(tmp_path / "sweep")).rows()
    assert len(rows) == 8
    assert len({row.facts["worker"] for row in rows}) == 2


@pytest.mark.long
def test_what_slurm_refuses_is_said(slurm, data, tmp_path):
    code, _, err = isoflop(
        *("sweep", "run", "tiny", "--data", data, "--out", tmp_path / "sweep", "--steps", 10, "--seq-len", 32),
        *("--set", "learning_rate=1e-3,1e-2", "--launcher", "slurm", "--slurm-set", "partition=none"),
    )
    assert code == 2
    assert "invalid partition" in err

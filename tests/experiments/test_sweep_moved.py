"""A sweep is the same from everywhere: moved, renamed, mounted twice, copied, or made by an older version."""

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import threading
import time

import pytest

from experiments.sweep import storage
from experiments.sweep.address import check_given
from experiments.sweep.analysis.results import read_results
from experiments.sweep.checks import check_data
from experiments.sweep.definition import define
from experiments.sweep.identity import _by_path
from experiments.sweep.ledger import Ledger
from experiments.sweep.record import Sweep
from experiments.sweep.run import begin, separate, with_places
from model import InputError, presets

TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, to be left and come back to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(data):
    """A sweep of two rates in a folder, as a command defines it; nothing is written."""

    def plan(folder, storage=None, **changes):
        given = {"axes": ("learning_rate=1e-3,1e-2",), "steps": 6, "batch_size": 4, "seq_len": 32, "data": data}
        return define(TINY, folder=folder, storage=storage, **given | changes)

    return plan


@pytest.fixture
def make(plan):
    """A sweep of four trials that was begun, the first of them finished; nothing is trained."""

    def make(folder, storage=None, **changes):
        sweep = plan(folder, storage, **{"seeds": 2} | changes)
        finish_one(begin(sweep), sweep)
        return sweep

    return make


def finish_one(ledger, sweep, loss=2.0):
    wanted = {row.trial.id: 6 for row in ledger.rows() if row.state == "planned"}
    (claim,) = ledger.claim(wanted, 1)
    run = sweep.run_folder(claim.trial)
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": "finished", "step": 6}))
    assert ledger.finish(claim, [loss], {"run": f"runs/{run.name}", "steps": 6})


def states(folder):
    return sorted(row["state"] for row in read_results(folder).rows)


def files(*folders):
    """Every file below, by name, time and content."""
    found = (path for folder in folders for path in sorted(folder.rglob("*")))
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in found}


def as_older_version(folder, storage):
    """Make the sweep what an older version left: no id, its study named after the path, the storage as it was given."""
    import optuna

    sweep = Sweep.read(folder)
    old = f"{folder.name}{_by_path(folder)}"
    optuna.copy_study(
        from_study_name=sweep.id, from_storage=Ledger(sweep).storage.optuna,
        to_storage=Ledger(sweep).storage.optuna, to_study_name=old,
    )  # fmt: skip
    optuna.delete_study(study_name=sweep.id, storage=Ledger(sweep).storage.optuna)
    content = json.loads((folder / "sweep.json").read_text())
    del content["id"], content["beside"], content["checksum"]
    (folder / "sweep.json").write_text(json.dumps(content | {"storage": storage}))
    return old


FOUR = ["finished", "planned", "planned", "planned"]


@pytest.mark.parametrize(
    "storage",
    [None, "journal:{0}/log/ledger.log", "journal:../one.log", "sqlite:///s/own.db", "sqlite:///a ?#%{{}}.db"],
)
def test_a_sweep_is_the_same_wherever_its_folder_lies_and_whoever_asks(plan, make, place, monkeypatch, storage):
    (place / "work").mkdir()
    monkeypatch.chdir(place / "work")
    folder = place / "work" / "s"
    if storage is not None and "?" in storage:
        with pytest.raises(InputError, match="without options"):
            make("s", storage)
        return
    sweep = make("s", storage and storage.format(folder))
    kept = {"journal:{0}/log/ledger.log": "journal:log/ledger.log", "sqlite:///s/own.db": "sqlite:///own.db"}
    kept["journal:../one.log"] = f"journal:{place / 'one.log'}"
    assert Sweep.read("s").storage == (storage and kept[storage])
    assert Sweep.read("s").id == sweep.id
    before = files(place)
    for seen in ("s", "s/", "./s", str(folder), f"../{os.path.basename(os.getcwd())}/s"):
        assert states(seen) == FOUR
    monkeypatch.chdir(folder)
    assert states(".") == FOUR
    monkeypatch.chdir(place)
    (place / "link").symlink_to(folder)
    assert states("link") == FOUR
    (place / "link").unlink()
    assert files(place) == before, "reading writes nothing"

    # Renamed, then moved below another folder with a name that is no URL, and worked on from there.
    odd = place / "else where" / "50% of #1? {x}"
    odd.parent.mkdir()
    folder.rename(odd)
    assert states(odd) == FOUR
    moved = Sweep.read(odd)
    assert moved.id == sweep.id
    finish_one(begin(moved), moved)
    assert states(odd) == ["finished", "finished", "planned", "planned"]
    # The same command, now for the folder at its new place, adds to it.
    more = plan(odd, seeds=3)
    assert more.id == sweep.id
    begin(more)
    assert states(odd) == ["finished", "finished", *["planned"] * 4]


def test_a_copy_is_refused_to_work_until_it_is_a_sweep_of_its_own(make, place):
    sweep = make(place / "a", "journal:shared.log")
    shutil.copytree(place / "a", place / "b")
    finish_one(begin(sweep), sweep)  # after the copy was made: the copy does not have its run
    copy = Sweep.read(place / "b")
    before = files(place)
    with pytest.raises(
        InputError, match=rf"b is a copy of {place / 'a'}.*`isoflop sweep resume {place / 'b'} --new-id`"
    ):
        begin(copy)
    with pytest.raises(InputError, match="is a copy of"):
        Ledger(copy)
    assert files(place) == before
    assert states(place / "b") == ["finished", "finished", "planned", "planned"], "a copy may be read"
    own = separate(copy)
    assert own.id != sweep.id
    assert Sweep.read(place / "b").id == own.id
    begin(own)
    assert states(place / "b") == FOUR, "it has the results of the runs in its folder, and plans the others"
    assert states(place / "a") == ["finished", "finished", "planned", "planned"]
    with pytest.raises(InputError, match="a storage of its own in its folder; leave --new-id out"):
        separate(make(place / "c"))


def test_a_folder_that_was_moved_or_is_mounted_twice_is_no_copy(make, place, monkeypatch):
    sweep = make(place / "a", "journal:shared.log")
    shutil.copytree(place / "a", place / "b")  # to another disk, where it has another inode
    shutil.rmtree(place / "a")
    begin(Sweep.read(place / "b"))
    shutil.copytree(place / "b", place / "a")
    with pytest.raises(InputError, match=rf"a is a copy of {place / 'b'}"):
        begin(Sweep.read(place / "a"))
    begin(Sweep.read(place / "b"))
    # Two mounts of one folder: two paths, one inode number.
    number, stat = (place / "b").stat().st_ino, type(place).stat

    def same_inode(path, **arguments):
        found = stat(path, **arguments)
        return os.stat_result([found[0], number, *found[2:]]) if path in (place / "a", place / "b") else found

    monkeypatch.setattr(type(place), "stat", same_inode)
    for name in ("a", "b", "a"):
        begin(Sweep.read(place / name))
    assert Sweep.read(place / "a").id == sweep.id


def test_two_that_begin_the_same_sweep_at_once_share_it(plan, place):
    sweeps = [plan(place / "s", "journal:x.log") for _ in range(2)]
    assert sweeps[0].id != sweeps[1].id
    ledgers = []
    threads = [threading.Thread(target=lambda sweep=sweep: ledgers.append(begin(sweep))) for sweep in sweeps]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({ledger.storage.name for ledger in ledgers}) == 1
    assert list(ledgers[0].storage.studies()) == [Sweep.read(place / "s").id]
    assert states(place / "s") == ["planned", "planned"]


def test_a_sweep_of_an_older_version_keeps_its_study(make, place, monkeypatch):
    make(place / "a", "journal:log")
    old = as_older_version(place / "a", "journal:log")
    make(place / "other", "journal:log", axes=("learning_rate=5e-3,6e-3",))
    monkeypatch.chdir(place / "other")  # its storage was given relative to where the sweep was made
    before = files(place)
    assert states(place / "a") == FOUR
    (place / "a").rename(place / "b")
    assert states(place / "b") == FOUR
    (place / "b").rename(place / "a")
    assert files(place) == before, "reading writes nothing, and gives no id"
    shutil.copytree(place / "a", place / "copy")
    with pytest.raises(InputError, match="is a copy of"):
        begin(Sweep.read(place / "copy"))
    shutil.rmtree(place / "copy")
    (place / "a").rename(place / "b")
    moved = Sweep.read(place / "b")
    finish_one(begin(moved), moved)
    kept = Sweep.read(place / "b")
    assert (kept.id, kept.storage) == (old, f"journal:{place / 'log'}")
    assert states(place / "b") == ["finished", "finished", "planned", "planned"]


def test_of_several_studies_that_could_be_an_older_sweeps_a_person_says_which(make, place):
    names = []
    for name in ("a", "b"):
        make(place / name, "journal:log")
        names.append(as_older_version(place / name, "journal:log"))
    (place / "b").rename(place / "c")
    shutil.rmtree(place / "a")
    with pytest.raises(InputError, match=f'"id": "NAME", into {place / "c" / "sweep.json"}: {", ".join(names)}'):
        states(place / "c")
    path = place / "c" / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": names[1], "storage": f"journal:{place / 'log'}"}))
    assert states(place / "c") == FOUR


def test_data_and_storage_that_were_moved(make, place, data, monkeypatch):
    """With the folder they are found again; apart from it a person says where, and what is there is checked."""
    shutil.copytree(data, place / "project" / "data")
    make(place / "project" / "s", f"journal:{place}/project/log", seeds=1, data=place / "project" / "data")
    (place / "project").rename(place / "renamed")
    folder = place / "renamed" / "s"
    monkeypatch.chdir("/")
    assert states(folder) == ["finished", "planned"]
    sweep = Sweep.read(folder)
    assert check_data(sweep).hash == sweep.data_hash
    begin(sweep)
    assert Sweep.read(folder).data == place / "renamed" / "data"

    (place / "renamed" / "log").rename(place / "elsewhere.log")
    (place / "renamed" / "data").rename(place / "elsewhere")
    for look in (states, lambda folder: begin(Sweep.read(folder))):
        with pytest.raises(InputError, match=r"does not exist; if it was moved.*--storage journal:FILE`"):
            look(folder)
    with pytest.raises(InputError, match=rf"not at {place}/renamed/data any more; .*resume {folder} --data FOLDER"):
        check_data(Sweep.read(folder))
    with pytest.raises(InputError, match="its trials are there and not in"):
        with_places(Sweep.read(folder), storage=f"journal:{place}/none.log")
    sweep = with_places(Sweep.read(folder), place / "elsewhere", f"journal:{place}/elsewhere.log")
    check_data(sweep)
    begin(sweep)
    assert states(folder) == ["finished", "planned"]
    there = Sweep.read(folder)
    assert (there.data, there.storage) == (place / "elsewhere", f"journal:{place}/elsewhere.log")


def test_what_a_killed_writer_left_half_done_is_read_as_it_was_before(make, place):
    """SQLite takes it back at the next opening, which a reader may not do to the sweep's own file."""
    make(place / "s")
    shutil.copytree(place / "s", place / "killed")
    with contextlib.closing(sqlite3.connect(place / "s" / "ledger.db", isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size=1")  # what is changed goes to the file before it is committed
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("CREATE TABLE much AS SELECT zeroblob(1000000)")
        writer.execute("DELETE FROM trials")
        for name in ("ledger.db", "ledger.db-journal"):
            shutil.copy(place / "s" / name, place / "killed" / name)
        writer.execute("ROLLBACK")
    before = files(place)
    assert states(place / "killed") == FOUR
    assert files(place) == before


def test_a_storage_that_may_not_be_written_is_said_at_once(make, place, monkeypatch):
    """It was taken for a database that is away, and asked again for ten minutes."""
    make(place / "s", f"sqlite:///{place}/x.db")
    monkeypatch.setattr("experiments.sweep.storage._PATIENCE_SECONDS", 5.0)
    shutil.copytree(place / "s", place / "copy")
    shutil.rmtree(place / "s")  # so that the copy, which was moved, notes its place
    connect = storage._connect
    monkeypatch.setattr(storage, "_connect", lambda file, mode: connect(file, "ro"))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"x\.db may not be written by this user"):
        Ledger(Sweep.read(place / "copy"))
    assert time.monotonic() - began < 4
    assert states(place / "copy") == FOUR


def test_reading_what_is_not_there_yet_makes_nothing(plan, place, isoflop):
    sweep = plan(place / "s")
    for url in (None, f"journal:{place}/no/x.log", f"sqlite:///{place}/x.db"):
        dataclasses.replace(sweep, storage=url).write()
        before = files(place)
        assert states(place / "s") == []
        code, out, err = isoflop("sweep", "status", place / "s")
        assert (code, "0 trials" in out) == (0, True), err
        assert files(place) == before
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true", "journal:"):
        with pytest.raises(InputError, match=r"sqlite:///FILE|journal:FILE"):
            check_given(url)

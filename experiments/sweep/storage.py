"""Wrap an Optuna storage of any kind, with heartbeats, clear errors on opening, and retries while a database is down.

Optuna has heartbeats for databases only; in a journal file the time of the last one is stored as an attribute of the
trial.
"""

import atexit
import errno
import functools
import logging
import random
import shutil
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from experiments.sweep.address import file_of, shown
from model.errors import InputError

logger = logging.getLogger("isoflop")
BEAT = "beat"
_URL_OF_FILES = "sqlite:///file"  # of any: `_engine` opens it
_PATIENCE_SECONDS = 600.0  # seconds to retry while a database is down, for example during a restart


class Storage:
    """The trials of one study, in any kind of storage.

    url: as `address.opened` gives it. interval: seconds between a worker's heartbeats; grace: without one for so long,
    it counts as dead. read_only: nothing is written, not even the file or the tables of a storage that has none yet; it
    then has no studies. Raises InputError if it cannot be opened.
    """

    def __init__(self, url: str, *, interval: int = 15, grace: int = 90, read_only: bool = False):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.url, self.interval, self.grace, self.read_only = url, interval, grace, read_only
        self.database: Any = None
        self.optuna: Any = None
        self.name: str | None = None
        self.study_id: int | None = None
        self._open()

    def _open(self) -> None:
        """Open the storage; read-only, a missing one counts as empty."""
        from optuna.storages import get_storage

        if self.url.startswith("journal:"):
            self.optuna = _open_journal(Path(self.url.removeprefix("journal:")), self.read_only)
            return
        self.database = _open_database(self.url, self.interval, self.grace, self.read_only)
        self.optuna = None if self.database is None else get_storage(self.database)

    def use(self, name: str, directions: list[str]) -> None:
        """Select the study of that name; it is created unless read_only.

        directions: "minimize" or "maximize" of each objective. Raises InputError if the study has others.
        """
        import optuna

        self.name = name
        self._find_study()
        if self.study_id is None and not self.read_only:
            arguments = {"study_name": name, "storage": self.optuna, "directions": directions, "load_if_exists": True}
            self.call(optuna.create_study, **arguments)
            self._find_study()
        if self.study_id is None:
            return
        there = self.call(self.optuna.get_study_directions, self.study_id)
        if [direction.name.lower() for direction in there] != directions:
            raise InputError(
                f"the storage {shown(self.url)} has a sweep {name!r} with other objectives; choose another one"
            )

    def _find_study(self) -> None:
        """Find the study, which another process may create after a reader has begun to watch."""
        if self.optuna is None:
            self._open()
        if self.optuna is not None and self.name in self.studies():
            self.study_id = self.call(self.optuna.get_study_id_from_name, self.name)

    def studies(self) -> dict[str, int]:
        """Return the keys of all studies in the storage, by their names."""
        if self.optuna is None:
            return {}
        return {study.study_name: study._study_id for study in self.call(self.optuna.get_all_studies)}

    def call(self, function: Callable, *arguments: Any, **named: Any) -> Any:
        """Call the function, with retries while the database is down.

        Raises InputError if the file of the database may not be written.
        """
        wait, until, told = 0.2, time.monotonic() + _PATIENCE_SECONDS, False
        while True:
            try:
                return function(*arguments, **named)
            except Exception as error:
                if _is_read_only(error):
                    raise InputError(f"the storage {shown(self.url)} may not be written by this user") from None
                if not _is_transient(error) or time.monotonic() > until:
                    raise
                if not told and wait > 1:  # a short lock is not reported
                    logger.warning(
                        "the sweep's database does not answer; trying for %.0f minutes", _PATIENCE_SECONDS / 60
                    )
                    told = True
                self.forget_session()
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, 5)

    def trials(self, study_id: int | None = None) -> list[Any]:
        """Return all trials of the study, or of another one, as Optuna has them, by number; not to be changed."""
        if study_id is None and self.study_id is None:
            self._find_study()
        key = self.study_id if study_id is None else study_id
        return [] if key is None else self.call(self.optuna.get_all_trials, key, deepcopy=False)

    def attribute(self, name: str, study_id: int | None = None) -> Any:
        """Return an attribute of the study, or of another one; None if it was not set."""
        key = self.study_id if study_id is None else study_id
        return self.call(self.optuna.get_study_user_attrs, key).get(name)

    def set_attribute(self, name: str, value: Any) -> None:
        """Set an attribute of the study."""
        self.call(self.optuna.set_study_user_attr, self.study_id, name, value)

    def create(self, template: Any) -> int:
        """Add a trial and return its key. If the database went down meanwhile, the trial may be added twice."""
        return self.call(self.optuna.create_new_trial, self.study_id, template)

    def beat(self, key: int) -> None:
        """Record a heartbeat of the trial's worker. It is not retried, as the next one follows soon."""
        if self.database:
            self.database.record_heartbeat(key)
        else:
            self.optuna.set_trial_user_attr(key, BEAT, time.time())

    def stale(self) -> list[int]:
        """Return the keys of running trials whose last heartbeat is older than the grace period."""
        if self.database:
            return self.call(self.database._get_stale_trial_ids, self.study_id)
        running = [trial for trial in self.trials() if trial.state.name == "RUNNING"]
        return [t._trial_id for t in running if time.time() - t.user_attrs.get(BEAT, time.time()) > self.grace]

    def set(self, key: int, **attributes: Any) -> bool:
        """Set attributes of a trial (by its key); return False if the trial has already ended."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            for name, value in attributes.items():
                self.call(self.optuna.set_trial_user_attr, key, name, value)
        except UpdateFinishedTrialError:
            return False
        return True

    def move(self, key: int, state: str, values: list[float] | None = None) -> bool:
        """Change a trial's state atomically; return False if it has ended or another worker has claimed it."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            return self.call(self.optuna.set_trial_state_values, key, TrialState[state], values)
        except UpdateFinishedTrialError:
            return False

    def forget_session(self) -> None:
        """Close this thread's connection."""
        if self.database:
            self.database.remove_session()


def _open_journal(path: Path, read_only: bool) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if read_only and not path.exists():
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError) as error:
        raise InputError(f"the journal {path} cannot be opened: {error}") from None


def _open_database(url: str, interval: int, grace: int, read_only: bool) -> Any:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    file = file_of(url)
    try:
        if read_only:
            if file is not None and not file.exists():
                return None
            file = None if file is None else _readable_file(file)
            if not _has_tables(url, _engine(url, file, read_only)):
                return None
        storage = RDBStorage(
            _URL_OF_FILES if file else url,
            engine_kwargs=_engine(url, file, read_only),
            heartbeat_interval=interval,
            grace_period=grace,
        )
    except ArgumentError:
        raise InputError(
            f"the storage {url!r} is not a database URL; give sqlite:///FILE, postgresql+psycopg://HOST/NAME or "
            "journal:FILE"
        ) from None
    except ImportError as error:
        cause = error.__cause__ or error
        raise InputError(f"the storage {shown(url)} needs a driver that is not installed ({cause})") from None
    except (SQLAlchemyError, sqlite3.Error, OSError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise InputError(f"the storage {shown(url)} cannot be reached: {reason}") from None
    if file is not None and not read_only:
        _lock_before_reading(storage.engine)
    return storage


def _has_tables(url: str, settings: dict[str, Any]) -> bool:
    """Return whether the database holds Optuna's tables already."""
    from sqlalchemy import create_engine, inspect

    engine = create_engine(_URL_OF_FILES if "creator" in settings else url, **settings)
    try:
        return inspect(engine).has_table("studies")
    finally:
        engine.dispose()


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    """Open a SQLite file. mode: "ro", or "rwc" to make it where it is missing."""
    uri = f"file:{quote(str(file.absolute()))}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=60, check_same_thread=False)


def _readable_file(file: Path) -> Path:
    """Return the SQLite file, or a repaired copy if a killed writer left an unfinished transaction."""
    try:
        connection = _connect(file, "ro")
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        journal = file.with_name(f"{file.name}-journal")
        if not journal.exists() or error.sqlite_errorname not in ("SQLITE_READONLY_ROLLBACK", "SQLITE_CANTOPEN"):
            raise
        folder = Path(tempfile.mkdtemp(prefix="isoflop-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for part in (journal, file):
            shutil.copyfile(part, folder / part.name)
        copy = sqlite3.connect(folder / file.name)  # rolls the transaction back
        copy.execute("SELECT count(*) FROM sqlite_master").fetchone()
        copy.close()
        return folder / file.name
    return file


def _engine(url: str, file: Path | None, read_only: bool) -> dict[str, Any]:
    """Return settings of SQLAlchemy's engine; opening SQLite by path avoids quoting in URLs."""
    from sqlalchemy.pool import QueuePool

    if file is not None:
        return {"creator": functools.partial(_connect, file, "ro" if read_only else "rwc"), "poolclass": QueuePool}
    connect = {"connect_timeout": 10} if url.startswith("postgresql") else {}
    return {"pool_pre_ping": True, "connect_args": connect}


def _lock_before_reading(engine: Any) -> None:
    """Make every transaction of SQLite take the lock at its beginning.

    By itself the driver begins one only at the first write: two workers that both read "waiting" would both claim.
    """
    from sqlalchemy import event

    engine.dispose()

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _is_read_only(error: BaseException | None) -> bool:
    """Return whether the file is read-only, so that a retry is useless."""
    while error is not None:
        if getattr(error, "sqlite_errorname", "").startswith("SQLITE_READONLY"):
            return True
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return True
        error = error.__cause__
    return False


def _is_transient(error: BaseException | None) -> bool:
    """Return whether the error means that the database was down or busy, so that a retry may succeed."""
    from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError, PendingRollbackError)):
            return True
        error = error.__cause__
    return False

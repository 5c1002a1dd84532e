"""An Optuna storage of any kind, with heartbeats: what cannot be opened is said, what is away for a while is retried.

Optuna has heartbeats for databases only; for a journal file a trial's own attribute holds the time of its last one.
"""

import logging
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.errors import InputError

logger = logging.getLogger("isoflop")
BEAT = "beat"
_PATIENCE_SECONDS = 600.0  # in which a database that went away, as while it restarts, may come back


class Storage:
    """The trials of one study, in whatever keeps them.

    url: a database's as SQLAlchemy reads it, or `journal:PATH`. directions: "minimize" or "maximize" of each objective.
    interval: seconds between a worker's heartbeats; grace: without one for so long, it counts as dead.
    Raises InputError where it cannot be opened.
    """

    def __init__(self, url: str, name: str, directions: list[str], *, interval: int = 15, grace: int = 90):
        import optuna
        from optuna.storages import get_storage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.interval, self.grace = interval, grace
        self.database = None if url.startswith("journal:") else _open_database(url, interval, grace)
        self.optuna = get_storage(self.database) if self.database else _open_journal(url.removeprefix("journal:"))
        self.name = name
        self.study = self.call(
            optuna.create_study,
            study_name=name,
            storage=self.optuna,
            directions=directions,
            load_if_exists=True,
        )
        self.study_id = self.call(self.optuna.get_study_id_from_name, name)
        if [direction.name.lower() for direction in self.study.directions] != directions:
            raise InputError(f"the storage {shown(url)} has a sweep {name!r} with other objectives; choose another one")

    def call(self, function: Callable, *arguments: Any, **named: Any) -> Any:
        """The function's answer, however often the database has to be asked."""
        wait, until, told = 0.2, time.monotonic() + _PATIENCE_SECONDS, False
        while True:
            try:
                return function(*arguments, **named)
            except Exception as error:
                if not _is_transient(error) or time.monotonic() > until:
                    raise
                if not told and wait > 1:  # a moment's lock is nothing to speak of
                    logger.warning(
                        "the sweep's database does not answer; trying for %.0f minutes", _PATIENCE_SECONDS / 60
                    )
                    told = True
                self.forget_session()
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, 5)

    def trials(self) -> list[Any]:
        """All trials as Optuna has them, by number; not to be changed."""
        return self.call(self.optuna.get_all_trials, self.study_id, deepcopy=False)

    def create(self, template: Any) -> int:
        """Add a trial; its key. Where the database went away in between, it may be there twice."""
        return self.call(self.optuna.create_new_trial, self.study_id, template)

    def beat(self, key: int) -> None:
        """Say that whoever has this trial is alive. Tried once: the next one comes soon."""
        if self.database:
            self.database.record_heartbeat(key)
        else:
            self.optuna.set_trial_user_attr(key, BEAT, time.time())

    def stale(self) -> list[int]:
        """The keys of running trials whose last heartbeat is too long ago."""
        if self.database:
            return self.call(self.database._get_stale_trial_ids, self.study_id)
        running = [trial for trial in self.trials() if trial.state.name == "RUNNING"]
        return [t._trial_id for t in running if time.time() - t.user_attrs.get(BEAT, time.time()) > self.grace]

    def set(self, key: int, **attributes: Any) -> bool:
        """Set attributes of a trial; False where it has ended already."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            for name, value in attributes.items():
                self.call(self.optuna.set_trial_user_attr, key, name, value)
        except UpdateFinishedTrialError:
            return False
        return True

    def move(self, key: int, state: str, values: list[float] | None = None) -> bool:
        """Change a trial's state, atomically; False where it has ended, or on the way to RUNNING was not WAITING."""
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


def shown(url: str) -> str:
    """A storage's URL without its password."""
    if url.startswith("journal:"):
        return url
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def without_password(url: str) -> str:
    """A PostgreSQL storage's URL to be written down: its password goes to PGPASSWORD, where libpq looks for it.

    Workers that this process starts have it from there; others need it set, or a ~/.pgpass.
    """
    if not url.startswith("postgresql"):
        return url
    from sqlalchemy.engine import URL, make_url

    whole = make_url(url)
    if whole.password is None:
        return url
    os.environ["PGPASSWORD"] = str(whole.password)
    bare = URL.create(whole.drivername, whole.username, None, whole.host, whole.port, whole.database, whole.query)
    return bare.render_as_string()


def _open_journal(path: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(path))
    except (OSError, ValueError) as error:
        raise InputError(f"the journal {path} cannot be opened: {error}") from None


def _open_database(url: str, interval: int, grace: int) -> Any:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        storage = RDBStorage(
            url,
            engine_kwargs=_engine(url),
            heartbeat_interval=interval,
            grace_period=grace,
        )
    except ArgumentError:
        raise InputError(
            f"the storage {url!r} is no URL of a database; give sqlite:///FILE, postgresql+psycopg://HOST/NAME or "
            "journal:FILE"
        ) from None
    except ImportError as error:
        cause = error.__cause__ or error
        raise InputError(f"the storage {shown(url)} needs a driver that is not installed ({cause})") from None
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise InputError(f"the storage {shown(url)} cannot be reached: {reason}") from None
    if url.startswith("sqlite"):
        _lock_before_reading(storage.engine)
    return storage


def _engine(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}
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


def _is_transient(error: BaseException | None) -> bool:
    """Whether the database was away or busy, and not that it refused what it was given."""
    from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError, PendingRollbackError)):
            return True
        error = error.__cause__
    return False

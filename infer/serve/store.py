"""Conversations in a SQLite file: one connection in a thread of its own, so that the event loop never waits.

A write is on disk once its future has a result, as far as a killed process is concerned (WAL, synchronous=NORMAL): what
has been committed is there after `kill -9`; a power failure may lose the last moments, never the file.
"""

import asyncio
import atexit
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from infer.serve.errors import ApiError
from model.errors import InputError

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

APPLICATION_ID = 0x69736F66  # "isof": SQLite's field for the program that a file belongs to
_SECONDS_LOCKED = 2.0  # how long a write waits for another program's

MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL,
        system TEXT NOT NULL,
        model TEXT NOT NULL,
        leaf INTEGER,
        created REAL NOT NULL,
        updated REAL NOT NULL
    );
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
        parent INTEGER REFERENCES messages(id),
        role TEXT NOT NULL,
        model TEXT NOT NULL,
        created REAL NOT NULL,
        finish_reason TEXT NOT NULL,
        settings TEXT NOT NULL,
        dropped TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        first_token_seconds REAL,
        seconds REAL,
        content TEXT NOT NULL,
        logprobs TEXT NOT NULL
    );
    CREATE INDEX messages_of_conversation ON messages(conversation);
    CREATE INDEX messages_of_parent ON messages(parent);
    CREATE INDEX conversations_by_time ON conversations(updated);
    CREATE TABLE pieces (
        id INTEGER PRIMARY KEY,
        message INTEGER NOT NULL REFERENCES messages(id) ON DELETE CASCADE,
        content TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        logprobs TEXT NOT NULL
    );
    CREATE INDEX pieces_of_message ON pieces(message);
    """,
)
"""By version: statements that make it of the one before. Later features add theirs at the end.

pieces: parts of an answer that is being written, moved into its message at the end. logprobs: JSON of tokens, without
the brackets of the list, so that parts are joined by commas. leaf: the last message of the branch that is shown.
"""

Job = tuple[Callable[[], Any], "Future[Any]"]


class Store:
    """A file of conversations, closed at the end of the program. path: None keeps them in memory. Thread-safe.

    Raises InputError if the file cannot be opened, is another program's, or was written by a newer version.
    """

    def __init__(self, path: Path | None):
        self._name = "the conversations in memory" if path is None else str(path)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                ":memory:" if path is None else path,
                timeout=_SECONDS_LOCKED,
                isolation_level=None,
                check_same_thread=False,
            )
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"{self._name} cannot be opened: {error}; give a file of conversations, or a new one in a folder where "
                "you may write"
            ) from error
        atexit.register(self.close)

    def _open(self) -> None:
        database = self._database
        (owner,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner != APPLICATION_ID and tables:
            raise InputError(f"{self._name} is a SQLite file of another program; give another file for conversations")
        if version > len(MIGRATIONS):
            raise InputError(
                f"{self._name} was written by a newer isoflop (version {version} of its tables, this one knows "
                f"{len(MIGRATIONS)}); update isoflop, or give another file"
            )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA foreign_keys = ON")
        for number, statements in enumerate(MIGRATIONS[version:], version + 1):
            database.executescript(
                f"BEGIN IMMEDIATE; {statements} PRAGMA application_id = {APPLICATION_ID};"
                f" PRAGMA user_version = {number}; COMMIT;"
            )

    def submit(
        self,
        function: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> "Future[Result]":
        """Run a function of the connection in one transaction, after all that were submitted before.

        Its exceptions are passed on, those of SQLite as an ApiError that says what to do.
        """
        future: Future[Result] = Future()
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="conversations", daemon=True)
                self._thread.start()
            self._jobs.put((lambda: function(self._database, *args, **options), future))
        return future

    async def run(
        self,
        function: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Return the result of `submit`."""
        return await asyncio.wrap_future(self.submit(function, *args, **options))

    def close(self) -> None:
        """Finish what was submitted and close the file. Nothing may be submitted afterwards."""
        atexit.unregister(self.close)
        with self._starting:
            self._jobs.put(None)
            if self._thread is not None:
                self._thread.join()
        self._database.close()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._transaction(work)
            except sqlite3.Error as error:
                future.set_exception(self._told(error))
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _transaction(self, work: Callable[[], Any]) -> Any:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            result = work()
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # SQLite ends it by itself after some errors
                self._database.execute("ROLLBACK")
            raise
        return result

    def _told(self, error: sqlite3.Error) -> ApiError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return ApiError(
                507,
                f"there is no room to store the conversation: {self._name} cannot grow; free some disk space",
                code="storage_full",
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return ApiError(
                503,
                f"{self._name} is locked by another program; try again, or close that program",
                code="storage_locked",
                retry_after=_SECONDS_LOCKED,
            )
        return ApiError(500, f"the conversation was not stored: {self._name}: {error}", code="storage_failed")

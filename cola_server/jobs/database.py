"""Opens the database: makes it where there is none, brings its schema up to date, refuses a damaged one by name.

A SQLite file is made under another name and renamed, so that a file by the right name is always a whole database: one
that is empty or has no schema was damaged, and is never silently recreated.
"""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError

from cola_common.errors import ColaError, Reason

MIGRATIONS = Path(__file__).parent / "migrations"

BUSY_SECONDS = 30
"""How long a SQLite writer waits for another: writers here hold the lock for a few milliseconds."""

RESERVE_BYTES = 1 << 20
"""Room for a hundred commits: enough to pause all jobs of a full disk, too little to be missed."""

MISSING = "the database is gone, but its files and checkpoints are here; restore it, or move them away"


class Database:
    """An open database of the newest schema."""

    def __init__(self, url: str, *, create: bool) -> None:
        """`create` allows to make one where there is none.

        Raises: `ColaError(INVALID_CONFIG)` for a URL that means nothing; `ColaError(INVALID_FILE)` for a database that
        is missing, damaged, not one of ours, or of a newer schema than this code's.
        """
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise ColaError(Reason.INVALID_CONFIG, setting="database", problem=str(error)) from None
        self._name = Path(parsed.database or "").name
        self._reserve: Path | None = None
        if parsed.get_backend_name() == "sqlite":
            self.engine = _open_file(parsed, create)
            self._reserve = Path(parsed.database or "").with_suffix(".reserve")
            self.reserve()
        else:
            self.engine = create_engine(parsed)
            with self.engine.begin() as connection:
                _migrate(connection, parsed.render_as_string(), create)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database. Raises: `ColaError(STORAGE_FULL)`."""
        with _storing(self._name), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write: on SQLite it holds the writer's lock from its start, so that what it reads
        stays true until it commits. Raises: `ColaError(STORAGE_FULL)`, with nothing changed.
        """
        with (
            _storing(self._name),
            self.engine.connect().execution_options(cola_writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    def reserve(self) -> None:
        """Holds room on the disk for what must be said when there is none, if there is plenty now."""
        if self._reserve is None or self._reserve.exists():
            return
        if shutil.disk_usage(self._reserve.parent).free > 4 * RESERVE_BYTES:
            with contextlib.suppress(OSError), self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def let_reserve_go(self) -> None:
        """Makes the room free that `reserve` holds."""
        if self._reserve is not None:
            self._reserve.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()


@contextlib.contextmanager
def _storing(name: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if _full(error):
            raise ColaError(Reason.STORAGE_FULL, file=name) from error
        raise


def _full(error: DBAPIError) -> bool:
    """Whether SQLite found no room: for the database or its log, or for the index of the log."""
    return getattr(error.orig, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def _open_file(url: URL, create: bool) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ColaError(Reason.INVALID_CONFIG, setting="database", problem="jobs must outlive the server; name a file")
    path = Path(url.database)
    if not path.exists():
        if not create:
            raise ColaError(Reason.INVALID_FILE, file=path, problem=MISSING)
        _make_file(url, path)
    elif path.stat().st_size == 0:
        raise ColaError(Reason.INVALID_FILE, file=path, problem="the database is empty; restore it from a copy")
    engine = _sqlite_engine(url)
    try:
        with engine.connect().execution_options(cola_writes=True) as connection, connection.begin():
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if found != "ok":
                raise ColaError(Reason.INVALID_FILE, file=path, problem=f"the database is damaged: {found}")
            _migrate(connection, str(path), create=False)
    except DatabaseError as error:
        engine.dispose()
        if _full(error):
            raise ColaError(Reason.STORAGE_FULL, file=path) from error
        raise ColaError(Reason.INVALID_FILE, file=path, problem=f"the database is damaged: {error.orig}") from error
    except ColaError:
        engine.dispose()
        raise
    return engine


def _make_file(url: URL, path: Path) -> None:
    unborn = path.with_name(path.name + ".new")
    for suffix in ("", "-wal", "-shm"):
        unborn.with_name(unborn.name + suffix).unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(unborn)) as file:
        file.execute("PRAGMA journal_mode = WAL")  # the file keeps it: readers do not wait for a writer
    engine = _sqlite_engine(url.set(database=str(unborn)))
    with engine.connect().execution_options(cola_writes=True) as connection, connection.begin():
        _migrate(connection, str(unborn), create=True)
    engine.dispose()  # the last connection to close moves the log into the file
    unborn.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions by itself: they begin below
        for pragma in (
            "foreign_keys = ON",
            "synchronous = FULL",  # what is committed stays committed after a power cut: epochs must never repeat
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        writes = connection.get_execution_options().get("cola_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _migrate(connection: Connection, name: str, create: bool) -> None:
    """Brings the schema up to date, or makes it where there is none and `create` allows it."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    current = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is None and not create:
        raise ColaError(Reason.INVALID_FILE, file=name, problem="it has no schema of this program's")
    if current is not None and current not in known:
        problem = f"the database has schema {current} of a newer version of this program"
        raise ColaError(Reason.INVALID_FILE, file=name, problem=problem)
    command.upgrade(config, "head")

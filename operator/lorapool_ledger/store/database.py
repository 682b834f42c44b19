"""The ledger's database: SQLite in a file, or PostgreSQL by its URL. One thread writes, some threads read.

Every other module is given a `Database` and passes it functions that work on a connection. A function may run twice: a
transaction that the database ends for a reason that may not last (a restart, a failover, a deadlock) is tried again
with a new connection when nothing of it was committed.

    LedgerDatabaseError           the database cannot be used; the message names the remedy
    └── DatabaseAwayError         it does not answer at present; the work may be tried again
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

log = logging.getLogger("lorapool_ledger")

T = TypeVar("T")

READERS = 4
"""Queries that run at the same time."""
BUSY_TIMEOUT_S = 10.0
"""SQLite waits this long for a lock of another process, such as a backup."""
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 60
"""PostgreSQL ends a statement that takes longer."""
MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 0x6C6F7261  # "lora"
"""Advisory lock of PostgreSQL that one process at a time holds while it migrates."""
_SESSION = {
    "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
    "idle_in_transaction_session_timeout": "120s",
    "tcp_keepalives_idle": "10",  # the server notices a lost client, and its locks end
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


class LedgerDatabaseError(Exception):
    """The database cannot be used. The message names the remedy and never a password."""


class DatabaseAwayError(LedgerDatabaseError):
    """The database does not answer at present."""


class Database:
    """Transactions on the ledger's tables. What is passed in runs in a thread and must not keep the connection."""

    def __init__(self, engine: Engine) -> None:
        """Use `open`, which also brings the tables up to date."""
        self.engine = engine
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="ledger-reader")

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.engine.dialect.name

    @classmethod
    def open(cls, url: str) -> Database:
        """Connects and runs the migrations. `sqlite:////folder/file` or `postgresql://user:password@host/name`.

        Raises LedgerDatabaseError.
        """
        engine = _engine(url)
        try:
            migrate(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in one transaction in the writer's thread; commits unless it raises.

        The result is returned after the commit. A call that is cancelled may still be committed. Raises
        DatabaseAwayError.
        """
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._transaction, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in a read-only transaction, in a reader's thread. It sees one state of the database.

        Raises DatabaseAwayError.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._reading, work)

    async def close(self) -> None:
        """Waits for what runs, then closes all connections."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._writer.shutdown)
        await loop.run_in_executor(None, self._readers.shutdown)
        self.engine.dispose()

    def _transaction(self, work: Callable[[Connection], T]) -> T:
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            raise _typed(error) from error

    def _reading(self, work: Callable[[Connection], T]) -> T:
        try:
            with self.engine.connect() as connection:
                connection.exec_driver_sql(_READ_ONLY[self.dialect])
                try:
                    return work(connection)
                finally:
                    connection.rollback()
                    if self.dialect == "sqlite":
                        connection.exec_driver_sql("PRAGMA query_only = OFF")
                        connection.rollback()
        except DBAPIError as error:
            raise _typed(error) from error


_READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
}


def _typed(error: DBAPIError) -> Exception:
    """Returns DatabaseAwayError for what may not last, else the error itself."""
    if error.connection_invalidated or isinstance(error, OperationalError):
        return DatabaseAwayError(_short(error))
    return error


def _short(error: SQLAlchemyError) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        driver = _DRIVERS[parsed.get_backend_name()]
    except (ArgumentError, KeyError, NoSuchModuleError):
        raise LedgerDatabaseError(
            "the database URL is not usable: write sqlite:////data/ledger.db or postgresql://user:password@host/database"
        ) from None
    parsed = parsed.set(drivername=driver)
    if driver.startswith("sqlite"):
        if not parsed.database or parsed.database == ":memory:":
            raise LedgerDatabaseError("the database URL names no file: write sqlite:////data/ledger.db")
        engine = create_engine(
            parsed,
            poolclass=QueuePool,
            pool_size=READERS + 2,
            max_overflow=READERS,
            connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    return create_engine(
        parsed,
        pool_size=READERS + 2,
        max_overflow=READERS,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "lorapool-ledger",
            "options": " ".join(f"-c {name}={value}" for name, value in _SESSION.items()),
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
        },
    )


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `begin` says, also around reads and changes of tables
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA temp_store = MEMORY")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = threading.current_thread().name.startswith("ledger-writer")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def migrate(engine: Engine) -> None:
    """Brings the tables up to date. Raises LedgerDatabaseError, also when a newer version has written them."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SET statement_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
                connection.commit()
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
                connection.commit()
            finally:
                if engine.dialect.name == "postgresql":
                    connection.rollback()
                    connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
                    connection.execute(text("RESET statement_timeout"))
                    connection.commit()
    except CommandError as error:
        known = ScriptDirectory.from_config(config).get_current_head()
        raise LedgerDatabaseError(
            f"the database has tables that this version does not know ({error}); it knows them up to {known}: "
            "install the version that wrote them, or a newer one"
        ) from None
    except OperationalError as error:
        raise DatabaseAwayError(
            f"the database cannot be opened: {_short(error)}. Check the URL, that the server or the volume is there, "
            "and that it may be written"
        ) from None
    except DBAPIError as error:
        raise LedgerDatabaseError(
            f"the tables cannot be brought up to date: {_short(error)}. The user of the URL must own the schema"
        ) from None

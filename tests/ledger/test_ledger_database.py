"""The database: migrations, transactions of one writer, read-only readers, and errors that name the remedy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from postgres_kit import running_postgres
from sqlalchemy import Connection, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from lorapool_ledger.store.database import Database, DatabaseAwayError, LedgerDatabaseError
from lorapool_ledger.store.tables import mark, metadata


def put(name: str, value: int = 1):
    def work(connection: Connection) -> None:
        connection.execute(insert(mark).values(name=name, value=value))

    return work


def count(connection: Connection) -> int:
    return int(connection.execute(select(func.count()).select_from(mark)).scalar_one())


async def test_the_migrated_tables_are_those_of_the_code(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


async def test_opening_again_keeps_what_was_written(database_url: str) -> None:
    first = Database.open(database_url)
    await first.write(put("a"))
    await first.close()
    second = Database.open(database_url)
    assert await second.read(count) == 1
    await second.close()


async def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    def work(connection: Connection) -> None:
        put("a")(connection)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await database.write(work)
    with pytest.raises(IntegrityError):
        await database.write(lambda connection: (put("b")(connection), put("b")(connection)))
    assert await database.read(count) == 0


async def test_writes_run_one_after_another_and_reads_see_whole_transactions(database: Database) -> None:
    def two(number: int):
        def work(connection: Connection) -> None:
            put(f"{number} first")(connection)
            put(f"{number} second")(connection)

        return work

    counts = await asyncio.gather(
        *(task for number in range(20) for task in (database.write(two(number)), database.read(count)))
    )
    assert {value % 2 for value in counts if value is not None} == {0}
    assert await database.read(count) == 40


async def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises((DBAPIError, LedgerDatabaseError)):
        await database.read(put("a"))
    assert await database.read(count) == 0
    await database.write(put("a"))  # the connection of the reader is in use again
    for _ in range(8):
        assert await database.read(count) == 1


async def test_a_database_of_a_newer_version_is_refused_with_the_remedy(database_url: str) -> None:
    database = Database.open(database_url)
    await database.write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    await database.close()
    with pytest.raises(LedgerDatabaseError, match="install the version that wrote them"):
        Database.open(database_url)


@pytest.mark.parametrize("url", ["", "ledger.db", "mysql://a/b", "sqlite://", "sqlite:///:memory:"])
def test_a_wrong_url_is_refused_with_the_right_forms(url: str) -> None:
    with pytest.raises(LedgerDatabaseError, match="sqlite:////data/ledger"):
        Database.open(url)


def test_a_file_that_is_no_database_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("no database\n" * 1000)
    with pytest.raises(LedgerDatabaseError):
        Database.open(f"sqlite:///{tmp_path}/ledger.db")
    with pytest.raises(LedgerDatabaseError, match="Check the URL"):
        Database.open(f"sqlite:///{tmp_path}/missing/ledger.db")


def test_the_password_is_never_shown() -> None:
    with pytest.raises(LedgerDatabaseError) as caught:
        Database.open("postgresql://ledger:hunter2secret@127.0.0.1:1/ledger")
    assert "hunter2secret" not in str(caught.value)


async def test_a_server_that_restarts_is_away_and_then_back() -> None:
    with running_postgres() as server:
        database = Database.open(server.database())
        await database.write(put("a"))
        server.stop()
        with pytest.raises(DatabaseAwayError):
            await database.write(put("b"))
        with pytest.raises(DatabaseAwayError):
            await database.read(count)
        server.start()
        await database.write(put("b"))
        assert await database.read(count) == 2
        await database.close()

"""Statements of every writer: inserts that ignore what exists, marks of hours whose sums are out of date, findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.dml import Insert as PostgresInsert
from sqlalchemy.dialects.sqlite.dml import Insert as SqliteInsert

from lorapool_ledger.store.tables import dirty_hour, finding, mark

HOUR_S = 3600
HOUR_MS = HOUR_S * 1000
CHUNK = 500
"""Rows of one statement, and values of one IN: SQLite takes at most 32,766 parameters."""


def insert_into(connection: Connection, table: Table) -> SqliteInsert | PostgresInsert:
    """An INSERT that knows ON CONFLICT, in the dialect of the connection."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)


def insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts the rows whose keys the table does not have."""
    if rows:
        connection.execute(insert_into(connection, table).on_conflict_do_nothing(), [dict(row) for row in rows])


def chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    """The values in parts that one IN takes."""
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


def mark_dirty(connection: Connection, times_ms: Iterable[int]) -> None:
    """Marks the hours of these times: their sums are made again."""
    hours = sorted({time_ms // HOUR_MS * HOUR_S for time_ms in times_ms})
    if hours:
        statement = insert_into(connection, dirty_hour)
        statement = statement.on_conflict_do_update(
            index_elements=[dirty_hour.c.hour_unix_s], set_={"marked": dirty_hour.c.marked + 1}
        )
        connection.execute(statement, [{"hour_unix_s": hour, "marked": 1} for hour in hours])


def set_mark(connection: Connection, name: str, value: int) -> None:
    """Notes how far a continuous task has come."""
    statement = insert_into(connection, mark).values(name=name, value=value)
    connection.execute(
        statement.on_conflict_do_update(index_elements=[mark.c.name], set_={"value": statement.excluded.value})
    )


def report(connection: Connection, check: str, subject: str, message: str, now_s: int, tokens: int = 0) -> None:
    """Records a finding; a later one of the same subject replaces its text and keeps its time."""
    statement = insert_into(connection, finding).values(
        check=check, subject=subject[:400], tokens=tokens, message=message, found_unix_s=now_s
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[finding.c.check, finding.c.subject],
            set_={"tokens": statement.excluded.tokens, "message": statement.excluded.message},
        )
    )

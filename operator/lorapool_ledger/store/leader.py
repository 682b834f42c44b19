"""Which of several replicas collects, sums and checks: the holder of an advisory lock of PostgreSQL.

The lock ends with the holder's connection, which the server notices to be dead within half a minute. It saves work and
keeps nothing correct: cursors and whole replacements do that, should two replicas write at one time. A ledger on SQLite
has one replica, which leads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from lorapool_ledger.store.database import Database

log = logging.getLogger("lorapool_ledger")

LEADER_LOCK = 0x6C6F7262  # "lorb"
INTERVAL_S = 2.0
_TRY = text("SELECT pg_try_advisory_lock(:key)")


class Leadership:
    def __init__(
        self, database: Database, on_change: Callable[[bool], None], *, interval_s: float = INTERVAL_S
    ) -> None:
        """`on_change(leads)` is called on the event loop after a change."""
        self._database = database
        self._on_change = on_change
        self._interval_s = interval_s
        self._connection: Connection | None = None
        self.leads = False

    async def run(self) -> None:
        """Competes for the lock until cancelled, and then gives it up."""
        try:
            while True:
                self._set(await asyncio.to_thread(self._hold))
                await asyncio.sleep(self._interval_s)
        finally:
            self._set(False)
            self._drop()

    def _set(self, leads: bool) -> None:
        if leads != self.leads:
            self.leads = leads
            log.info("this replica leads" if leads else "this replica does not lead any more")
            self._on_change(leads)

    def _hold(self) -> bool:
        if self._database.dialect == "sqlite":
            return True
        try:
            if self._connection is None:
                connection = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                if not connection.execute(_TRY, {"key": LEADER_LOCK}).scalar():
                    connection.close()
                    return False
                self._connection = connection
            else:
                self._connection.execute(text("SELECT 1"))
        except SQLAlchemyError as error:
            log.warning("the database does not answer", extra={"error": str(getattr(error, "orig", error))[:200]})
            self._drop()
            return False
        return True

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()  # its end releases the lock
            connection.close()

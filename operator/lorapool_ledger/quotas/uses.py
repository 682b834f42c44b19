"""The use of quotas in the database: the replica that leases notes it, and the console of every other one shows it."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, delete, select

from lorapool_api.quota_protocol import Meter
from lorapool_ledger.quotas.accounts import FORGET_MS, MINUTE_MS, Use, month_of
from lorapool_ledger.store.tables import quota_use
from lorapool_ledger.store.writes import insert_into


def note_uses(connection: Connection, uses: Iterable[Use], now_ms: int) -> None:
    """Replaces what is known of these quotas, and forgets those that were not used lately."""
    connection.execute(delete(quota_use).where(quota_use.c.noted_unix_ms < now_ms - FORGET_MS))
    rows = [
        {"scope": scope, "meter": meter.value, "most": limit, "used": used, "noted_unix_ms": now_ms}
        for scope, meter, limit, used in uses
    ]
    if rows:
        new = insert_into(connection, quota_use)
        values = {name: new.excluded[name] for name in ("most", "used", "noted_unix_ms")}
        connection.execute(new.on_conflict_do_update(index_elements=["scope", "meter"], set_=values), rows)


def noted_uses(connection: Connection, now_ms: int) -> list[Use]:
    """The quotas as the replica that leases noted them; rates are refilled since then."""
    found: list[Use] = []
    for scope, name, limit, used, noted_ms in connection.execute(select(quota_use)):
        meter = Meter(name)
        if meter.is_budget and month_of(noted_ms) != month_of(now_ms):
            continue
        refilled = 0 if meter.is_budget else limit * max(0, now_ms - noted_ms) // MINUTE_MS
        found.append((scope, meter, limit, max(0, used - refilled)))
    return found

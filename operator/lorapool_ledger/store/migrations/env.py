"""Alembic runs this for every command. The connection comes from `store.database.migrate`."""

from __future__ import annotations

from alembic import context

from lorapool_ledger.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()

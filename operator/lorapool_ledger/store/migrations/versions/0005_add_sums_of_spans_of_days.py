"""Add sums of spans of days.

Revision 0005, after 0004.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "model_span",
        sa.Column("day_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("base", sa.String(length=320), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=320), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False, comment="billing.Billed"),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger(), nullable=False),
        sa.Column("billed_prompt_tokens", sa.BigInteger(), nullable=False, comment="without the cached ones"),
        sa.Column("billed_cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("billed_completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("delivered_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day_unix_s", "project", "base", "uid", "model", "outcome"),
    )
    with op.batch_alter_table("model_span", schema=None) as batch_op:
        batch_op.create_index("model_span_by_project", ["project", "day_unix_s"], unique=False)

    op.create_table(
        "span",
        sa.Column("day_unix_s", sa.BigInteger(), nullable=False, comment="the first day"),
        sa.PrimaryKeyConstraint("day_unix_s"),
    )
    op.create_table(
        "pod_span",
        sa.Column("day_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("boot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False, comment="empty: the base; *: the pod as a whole"),
        sa.Column("model", sa.String(length=320), nullable=False),
        sa.Column("uptime_ns", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger(), nullable=False),
        sa.Column("byte_ns", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(
            ["boot"],
            ["boot.id"],
        ),
        sa.PrimaryKeyConstraint("day_unix_s", "boot", "uid"),
    )
    with op.batch_alter_table("pod_span", schema=None) as batch_op:
        batch_op.create_index("pod_span_by_account", ["uid", "day_unix_s"], unique=False)
    _fill_pods()


def _fill_pods() -> None:
    """The day's row of a whole pod gets the bytes of all its adapters."""
    pod_day = sa.table("pod_day", *map(sa.column, ("day_unix_s", "boot", "uid", "byte_ns")))
    sums: dict[tuple[int, int], int] = {}
    rows = sa.select(pod_day.c.day_unix_s, pod_day.c.boot, pod_day.c.byte_ns).where(pod_day.c.uid.not_in(["", "*"]))
    connection = op.get_bind()
    for day, boot, byte_ns in connection.execute(rows):
        sums[day, boot] = sums.get((day, boot), 0) + int(byte_ns)
    for (day, boot), byte_ns in sums.items():
        of_pod = (pod_day.c.day_unix_s == day) & (pod_day.c.boot == boot) & (pod_day.c.uid == "*")
        connection.execute(sa.update(pod_day).where(of_pod).values(byte_ns=str(byte_ns)))

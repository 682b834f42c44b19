"""Note the use of quotas for all replicas.

Revision 0004, after 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quota_use",
        sa.Column("scope", sa.String(length=400), nullable=False, comment="as in reservation"),
        sa.Column("meter", sa.String(length=32), nullable=False, comment="as in reservation"),
        sa.Column("most", sa.BigInteger(), nullable=False, comment="the quota"),
        sa.Column("used", sa.BigInteger(), nullable=False, comment="when this was noted; a rate is refilled since"),
        sa.Column("noted_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "meter"),
    )

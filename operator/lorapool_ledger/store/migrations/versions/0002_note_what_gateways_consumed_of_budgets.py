"""Note what gateways consumed of budgets.

Revision 0002, after 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("DELETE FROM reservation")  # it is written again every second
    consumed, used = "by this gateway process, as it last reported", "of the budget in the month, when this was written"
    with op.batch_alter_table("reservation") as table:
        table.add_column(sa.Column("consumed", sa.BigInteger(), nullable=False, comment=consumed))
        table.add_column(sa.Column("used", sa.BigInteger(), nullable=False, comment=used))

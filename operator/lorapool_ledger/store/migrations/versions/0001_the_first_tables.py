"""The first tables

Revision 0001, after none.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("key_uid", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=253), nullable=False, comment="name of its Secret"),
        sa.Column("owner", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("key_uid"),
    )
    op.create_table(
        "boot",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False, comment="the runtime process"),
        sa.Column("pod_uid", sa.String(length=64), nullable=False),
        sa.Column("pod", sa.String(length=253), nullable=False),
        sa.Column("base_uid", sa.String(length=64), nullable=False),
        sa.Column("base", sa.String(length=320), nullable=False, comment="namespace/name"),
        sa.Column("profile", sa.String(length=253), nullable=False, comment="decides the price of the pod"),
        sa.Column("device", sa.String(length=128), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("slot_bytes", sa.BigInteger(), nullable=False),
        sa.Column("device_bytes", sa.BigInteger(), nullable=False),
        sa.Column("started_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("cursor_seq", sa.BigInteger(), nullable=False, comment="committed up to here"),
        sa.Column("checked_seq", sa.BigInteger(), nullable=False, comment="R1 has passed up to here"),
        sa.Column("seen_unix_ms", sa.BigInteger(), nullable=False, comment="last answer of this process"),
        sa.Column("ended_unix_ms", sa.BigInteger(), nullable=True, comment="null while it lives"),
        sa.Column("end", sa.String(length=16), nullable=False, comment="stopped, killed, or gone (with its pod)"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("boot_id"),
    )
    with op.batch_alter_table("boot", schema=None) as batch_op:
        batch_op.create_index("boot_by_pod", ["pod_uid"], unique=False)

    op.create_table(
        "correction",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("correction_id", sa.String(length=64), nullable=False, comment="chosen by who corrects: once only"),
        sa.Column("recorded_unix_s", sa.BigInteger(), nullable=False, comment="decides the period in which it appears"),
        sa.Column("concerns_unix_s", sa.BigInteger(), nullable=False, comment="the time that is corrected"),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("key_uid", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=320), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.String(length=48), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("author", sa.String(length=253), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("correction_id"),
    )
    op.create_table(
        "dirty_hour",
        sa.Column("hour_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("marked", sa.BigInteger(), nullable=False, comment="grows with every mark"),
        sa.PrimaryKeyConstraint("hour_unix_s"),
    )
    op.create_table(
        "finding",
        sa.Column("check", sa.String(length=8), nullable=False, comment="R1 to R5"),
        sa.Column("subject", sa.String(length=400), nullable=False, comment="process, account, attempt or hour"),
        sa.Column("tokens", sa.BigInteger(), nullable=False, comment="by how many tokens the two sides differ"),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("found_unix_s", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("check", "subject"),
    )
    op.create_table(
        "gateway",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False, comment="the gateway process"),
        sa.Column("gateway", sa.String(length=253), nullable=False, comment="name of its pod"),
        sa.Column("cursor_seq", sa.BigInteger(), nullable=False),
        sa.Column("seen_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("boot_id"),
    )
    op.create_table(
        "invoice",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("month", sa.String(length=7), nullable=False, comment="2026-11"),
        sa.Column("closed_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False, comment="JSON of all lines, from which HTML and CSV are made"),
        sa.PrimaryKeyConstraint("project", "month"),
    )
    op.create_table(
        "mark",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "model_day",
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
    with op.batch_alter_table("model_day", schema=None) as batch_op:
        batch_op.create_index("model_day_by_project", ["project", "day_unix_s"], unique=False)

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
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sink", sa.String(length=63), nullable=False),
        sa.Column(
            "event_id", sa.String(length=200), nullable=False, comment="attempt and meter: the same at every delivery"
        ),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("next_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("outbox", schema=None) as batch_op:
        batch_op.create_index("outbox_due", ["sink", "next_unix_s"], unique=False)
        batch_op.create_index("outbox_event", ["sink", "event_id"], unique=True)

    op.create_table(
        "price",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "effective_unix_s",
            sa.BigInteger(),
            nullable=False,
            comment="valid from here until the next one of its scope",
        ),
        sa.Column(
            "scope",
            sa.String(length=320),
            nullable=False,
            comment="namespace/name of a base or adapter, a namespace/, or *",
        ),
        sa.Column(
            "line_item", sa.String(length=64), nullable=False, comment="prompt, cached, completion, residency, request"
        ),
        sa.Column("amount", sa.String(length=48), nullable=False, comment="per million tokens, GiB hour, or request"),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("recorded_unix_s", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("price", schema=None) as batch_op:
        batch_op.create_index("price_unique", ["effective_unix_s", "scope", "line_item"], unique=True)

    op.create_table(
        "quota_use",
        sa.Column("scope", sa.String(length=400), nullable=False, comment="as in reservation"),
        sa.Column("meter", sa.String(length=32), nullable=False, comment="as in reservation"),
        sa.Column("most", sa.BigInteger(), nullable=False, comment="the quota"),
        sa.Column("used", sa.BigInteger(), nullable=False, comment="when this was noted; a rate is refilled since"),
        sa.Column("noted_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "meter"),
    )
    op.create_table(
        "span",
        sa.Column("day_unix_s", sa.BigInteger(), nullable=False, comment="the first day"),
        sa.PrimaryKeyConstraint("day_unix_s"),
    )
    op.create_table(
        "usage_day",
        sa.Column("day_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("key_uid", sa.String(length=64), nullable=False),
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
        sa.PrimaryKeyConstraint("day_unix_s", "project", "key_uid", "base", "uid", "model", "outcome"),
    )
    with op.batch_alter_table("usage_day", schema=None) as batch_op:
        batch_op.create_index("usage_day_by_project", ["project", "day_unix_s"], unique=False)

    op.create_table(
        "usage_hour",
        sa.Column("hour_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("key_uid", sa.String(length=64), nullable=False),
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
        sa.PrimaryKeyConstraint("hour_unix_s", "project", "key_uid", "base", "uid", "model", "outcome"),
    )
    with op.batch_alter_table("usage_hour", schema=None) as batch_op:
        batch_op.create_index("usage_hour_by_project", ["project", "hour_unix_s"], unique=False)

    op.create_table(
        "attempt_closed",
        sa.Column("attempt", sa.String(length=128), nullable=False),
        sa.Column("gateway", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False, comment="usage_protocol.AttemptEnd"),
        sa.Column("code", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=True),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cold_ms", sa.BigInteger(), nullable=True),
        sa.Column("closed_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["gateway"],
            ["gateway.id"],
        ),
        sa.PrimaryKeyConstraint("attempt"),
    )
    with op.batch_alter_table("attempt_closed", schema=None) as batch_op:
        batch_op.create_index("attempt_closed_by_time", ["closed_unix_ms"], unique=False)
        batch_op.create_index("attempt_closed_by_writer", ["gateway", "seq"], unique=True)

    op.create_table(
        "attempt_opened",
        sa.Column("attempt", sa.String(length=128), nullable=False),
        sa.Column("gateway", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("key_uid", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=253), nullable=False),
        sa.Column("owner", sa.String(length=128), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("model", sa.String(length=320), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=128), nullable=False),
        sa.Column("base_uid", sa.String(length=64), nullable=False),
        sa.Column("base", sa.String(length=320), nullable=False),
        sa.Column("pod_uid", sa.String(length=64), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("route", sa.String(length=64), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("opened_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["gateway"],
            ["gateway.id"],
        ),
        sa.PrimaryKeyConstraint("attempt"),
    )
    with op.batch_alter_table("attempt_opened", schema=None) as batch_op:
        batch_op.create_index("attempt_opened_by_request_id", ["request_id"], unique=False)
        batch_op.create_index("attempt_opened_by_time", ["opened_unix_ms"], unique=False)
        batch_op.create_index("attempt_opened_by_writer", ["gateway", "seq"], unique=True)

    op.create_table(
        "checkpoint",
        sa.Column("boot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["boot"],
            ["boot.id"],
        ),
        sa.PrimaryKeyConstraint("boot", "seq"),
    )
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.create_index("checkpoint_by_account", ["boot", "uid", "seq"], unique=False)

    op.create_table(
        "minute_line",
        sa.Column("boot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=320), nullable=False),
        sa.Column("minute_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger(), nullable=False),
        sa.Column("byte_ns", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(
            ["boot"],
            ["boot.id"],
        ),
        sa.PrimaryKeyConstraint("boot", "seq", "uid"),
    )
    with op.batch_alter_table("minute_line", schema=None) as batch_op:
        batch_op.create_index("minute_line_by_time", ["minute_unix_s"], unique=False)

    op.create_table(
        "pod_day",
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
    with op.batch_alter_table("pod_day", schema=None) as batch_op:
        batch_op.create_index("pod_day_by_account", ["uid", "day_unix_s"], unique=False)

    op.create_table(
        "pod_hour",
        sa.Column("hour_unix_s", sa.BigInteger(), nullable=False),
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
        sa.PrimaryKeyConstraint("hour_unix_s", "boot", "uid"),
    )
    with op.batch_alter_table("pod_hour", schema=None) as batch_op:
        batch_op.create_index("pod_hour_by_account", ["uid", "hour_unix_s"], unique=False)

    op.create_table(
        "pod_minute",
        sa.Column("boot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("minute_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("uptime_ns", sa.BigInteger(), nullable=False),
        sa.Column("busy_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["boot"],
            ["boot.id"],
        ),
        sa.PrimaryKeyConstraint("boot", "seq"),
    )
    with op.batch_alter_table("pod_minute", schema=None) as batch_op:
        batch_op.create_index("pod_minute_by_time", ["minute_unix_s"], unique=False)

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

    op.create_table(
        "refusal_minute",
        sa.Column("gateway", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("minute_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("key_uid", sa.String(length=64), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["gateway"],
            ["gateway.id"],
        ),
        sa.PrimaryKeyConstraint("gateway", "seq"),
    )
    with op.batch_alter_table("refusal_minute", schema=None) as batch_op:
        batch_op.create_index("refusal_minute_by_time", ["minute_unix_s"], unique=False)

    op.create_table(
        "reservation",
        sa.Column("gateway", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "scope",
            sa.String(length=400),
            nullable=False,
            comment="key/<uid>, project/<namespace> or model/<namespace>/<name>",
        ),
        sa.Column("meter", sa.String(length=32), nullable=False, comment="requests, tokens, month_tokens, month_money"),
        sa.Column("leased", sa.String(length=48), nullable=False),
        sa.Column("consumed", sa.BigInteger(), nullable=False, comment="by this gateway process, as it last reported"),
        sa.Column("used", sa.BigInteger(), nullable=False, comment="of the budget in the month, when this was written"),
        sa.Column("until_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["gateway"],
            ["gateway.id"],
        ),
        sa.PrimaryKeyConstraint("gateway", "scope", "meter"),
    )
    op.create_table(
        "residency",
        sa.Column("boot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.String(length=16), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=128), nullable=False),
        sa.Column("model", sa.String(length=320), nullable=False),
        sa.Column("at_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("device_bytes", sa.BigInteger(), nullable=False),
        sa.Column("took_ns", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["boot"],
            ["boot.id"],
        ),
        sa.PrimaryKeyConstraint("boot", "seq"),
    )
    with op.batch_alter_table("residency", schema=None) as batch_op:
        batch_op.create_index("residency_by_adapter", ["uid", "at_unix_ms"], unique=False)

    op.create_table(
        "runtime_request",
        sa.Column("boot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False, comment="below seq: a remainder of several requests"),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.String(length=128), nullable=False, comment="empty for a remainder"),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("key_uid", sa.String(length=64), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=64), nullable=False, comment="of the LoraAdapter; empty for the base"),
        sa.Column("digest", sa.String(length=128), nullable=False),
        sa.Column("model", sa.String(length=320), nullable=False, comment="namespace/name of adapter or base"),
        sa.Column("sequences", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False, comment="usage_protocol.Ended"),
        sa.Column("started_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["boot"],
            ["boot.id"],
        ),
        sa.PrimaryKeyConstraint("boot", "seq"),
    )
    with op.batch_alter_table("runtime_request", schema=None) as batch_op:
        batch_op.create_index("runtime_request_by_attempt", ["attempt"], unique=False)
        batch_op.create_index("runtime_request_by_request_id", ["request_id"], unique=False)
        batch_op.create_index("runtime_request_by_time", ["ended_unix_ms"], unique=False)

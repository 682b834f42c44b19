"""The tables of the ledger, for SQLite and PostgreSQL alike.

Facts are inserted once and never updated or deleted before their retention ends; corrections are new rows. Sums are
replaced whole, never incremented. Cursors say how far a writer's records are committed; they change in the transaction
that inserts the records. Times are whole seconds or milliseconds since 1970, durations nanoseconds, money decimal text.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

metadata = MetaData()

Id = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself in a column of this very type only."""
Wide = String(40)
"""A whole number that may exceed 64 bits, as decimal text: byte nanoseconds."""
Money = String(48)
"""A decimal number as text: exact on both databases."""


def _tokens() -> tuple[Column[int], ...]:
    return tuple(
        Column(name, BigInteger, nullable=False, default=0)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "gpu_ns")
    )


# --- who wrote ---------------------------------------------------------------------------

boot = Table(
    "boot",
    metadata,
    Column("id", Id, primary_key=True),
    Column("boot_id", String(64), nullable=False, unique=True, comment="the runtime process"),
    Column("pod_uid", String(64), nullable=False),
    Column("pod", String(253), nullable=False),
    Column("base_uid", String(64), nullable=False),
    Column("base", String(320), nullable=False, comment="namespace/name"),
    Column("profile", String(253), nullable=False, default="", comment="decides the price of the pod"),
    Column("device", String(128), nullable=False, default=""),
    Column("slots", Integer, nullable=False, default=0),
    Column("slot_bytes", BigInteger, nullable=False, default=0),
    Column("device_bytes", BigInteger, nullable=False, default=0),
    Column("started_unix_ms", BigInteger, nullable=False),
    Column("cursor_seq", BigInteger, nullable=False, default=0, comment="committed up to here"),
    Column("checked_seq", BigInteger, nullable=False, default=0, comment="R1 has passed up to here"),
    Column("seen_unix_ms", BigInteger, nullable=False, comment="last answer of this process"),
    Column("ended_unix_ms", BigInteger, comment="null while it lives"),
    Column("end", String(16), nullable=False, default="", comment="stopped, killed, or gone (with its pod)"),
    Index("boot_by_pod", "pod_uid"),
)
"""Runtime processes. `cursor_seq`, `checked_seq`, `seen_unix_ms` and the end are the only values that change."""

gateway = Table(
    "gateway",
    metadata,
    Column("id", Id, primary_key=True),
    Column("boot_id", String(64), nullable=False, unique=True, comment="the gateway process"),
    Column("gateway", String(253), nullable=False, comment="name of its pod"),
    Column("cursor_seq", BigInteger, nullable=False, default=0),
    Column("seen_unix_ms", BigInteger, nullable=False),
    Column("ended", Boolean, nullable=False, default=False),
)
"""Gateway processes."""

# --- facts of runtimes -------------------------------------------------------------------

runtime_request = Table(
    "runtime_request",
    metadata,
    Column("boot", Id, ForeignKey("boot.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("first_seq", BigInteger, nullable=False, comment="below seq: a remainder of several requests"),
    Column("requests", BigInteger, nullable=False, default=1),
    Column("attempt", String(128), nullable=False, comment="empty for a remainder"),
    Column("request_id", String(128), nullable=False),
    Column("key_uid", String(64), nullable=False),
    Column("project", String(63), nullable=False),
    Column("uid", String(64), nullable=False, comment="of the LoraAdapter; empty for the base"),
    Column("digest", String(128), nullable=False),
    Column("model", String(320), nullable=False, comment="namespace/name of adapter or base"),
    Column("sequences", Integer, nullable=False, default=1),
    Column("outcome", String(16), nullable=False, comment="usage_protocol.Ended"),
    Column("started_unix_ms", BigInteger, nullable=False),
    Column("ended_unix_ms", BigInteger, nullable=False),
    *_tokens(),
    PrimaryKeyConstraint("boot", "seq"),
    Index("runtime_request_by_attempt", "attempt"),
    Index("runtime_request_by_time", "ended_unix_ms"),
    Index("runtime_request_by_request_id", "request_id"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("boot", Id, ForeignKey("boot.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("uid", String(64), nullable=False),
    Column("requests", BigInteger, nullable=False),
    *_tokens(),
    PrimaryKeyConstraint("boot", "seq"),
    Index("checkpoint_by_account", "boot", "uid", "seq"),
)

pod_minute = Table(
    "pod_minute",
    metadata,
    Column("boot", Id, ForeignKey("boot.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("minute_unix_s", BigInteger, nullable=False),
    Column("uptime_ns", BigInteger, nullable=False),
    Column("busy_ns", BigInteger, nullable=False),
    PrimaryKeyConstraint("boot", "seq"),
    Index("pod_minute_by_time", "minute_unix_s"),
)

minute_line = Table(
    "minute_line",
    metadata,
    Column("boot", Id, ForeignKey("boot.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("uid", String(64), nullable=False),
    Column("model", String(320), nullable=False),
    Column("minute_unix_s", BigInteger, nullable=False),
    Column("gpu_ns", BigInteger, nullable=False),
    Column("byte_ns", Wide, nullable=False),
    PrimaryKeyConstraint("boot", "seq", "uid"),
    Index("minute_line_by_time", "minute_unix_s"),
)

residency = Table(
    "residency",
    metadata,
    Column("boot", Id, ForeignKey("boot.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("type", String(16), nullable=False),
    Column("uid", String(64), nullable=False),
    Column("digest", String(128), nullable=False),
    Column("model", String(320), nullable=False),
    Column("at_unix_ms", BigInteger, nullable=False),
    Column("device_bytes", BigInteger, nullable=False),
    Column("took_ns", BigInteger, nullable=False),
    Column("reason", String(64), nullable=False),
    PrimaryKeyConstraint("boot", "seq"),
    Index("residency_by_adapter", "uid", "at_unix_ms"),
)

# --- facts of gateways -------------------------------------------------------------------

attempt_opened = Table(
    "attempt_opened",
    metadata,
    Column("attempt", String(128), primary_key=True),
    Column("gateway", Id, ForeignKey("gateway.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("key_uid", String(64), nullable=False),
    Column("key", String(253), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("project", String(63), nullable=False),
    Column("model", String(320), nullable=False),
    Column("uid", String(64), nullable=False),
    Column("digest", String(128), nullable=False),
    Column("base_uid", String(64), nullable=False),
    Column("base", String(320), nullable=False),
    Column("pod_uid", String(64), nullable=False),
    Column("boot_id", String(64), nullable=False),
    Column("route", String(64), nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("opened_unix_ms", BigInteger, nullable=False),
    Index("attempt_opened_by_time", "opened_unix_ms"),
    Index("attempt_opened_by_request_id", "request_id"),
    Index("attempt_opened_by_writer", "gateway", "seq", unique=True),
)

attempt_closed = Table(
    "attempt_closed",
    metadata,
    Column("attempt", String(128), primary_key=True),
    Column("gateway", Id, ForeignKey("gateway.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("outcome", String(16), nullable=False, comment="usage_protocol.AttemptEnd"),
    Column("code", Integer, nullable=False),
    Column("prompt_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
    Column("cold_ms", BigInteger),
    Column("closed_unix_ms", BigInteger, nullable=False),
    Index("attempt_closed_by_time", "closed_unix_ms"),
    Index("attempt_closed_by_writer", "gateway", "seq", unique=True),
)

refusal_minute = Table(
    "refusal_minute",
    metadata,
    Column("gateway", Id, ForeignKey("gateway.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("minute_unix_s", BigInteger, nullable=False),
    Column("key_uid", String(64), nullable=False),
    Column("project", String(63), nullable=False),
    Column("code", String(64), nullable=False),
    Column("count", BigInteger, nullable=False),
    PrimaryKeyConstraint("gateway", "seq"),
    Index("refusal_minute_by_time", "minute_unix_s"),
)

api_key = Table(
    "api_key",
    metadata,
    Column("key_uid", String(64), primary_key=True),
    Column("key", String(253), nullable=False, comment="name of its Secret"),
    Column("owner", String(128), nullable=False),
)
"""The keys of attempts as they were first used: their names are shown after their Secrets were deleted."""

# --- prices, corrections, closed periods -------------------------------------------------

price = Table(
    "price",
    metadata,
    Column("id", Id, primary_key=True),
    Column("effective_unix_s", BigInteger, nullable=False, comment="valid from here until the next one of its scope"),
    Column("scope", String(320), nullable=False, comment="namespace/name of a base or adapter, a namespace/, or *"),
    Column("line_item", String(64), nullable=False, comment="prompt, cached, completion, residency, request"),
    Column("amount", Money, nullable=False, comment="per million tokens, GiB hour, or request"),
    Column("currency", String(3), nullable=False),
    Column("recorded_unix_s", BigInteger, nullable=False),
    Index("price_unique", "effective_unix_s", "scope", "line_item", unique=True),
)

correction = Table(
    "correction",
    metadata,
    Column("id", Id, primary_key=True),
    Column("correction_id", String(64), nullable=False, unique=True, comment="chosen by who corrects: once only"),
    Column("recorded_unix_s", BigInteger, nullable=False, comment="decides the period in which it appears"),
    Column("concerns_unix_s", BigInteger, nullable=False, comment="the time that is corrected"),
    Column("project", String(63), nullable=False),
    Column("key_uid", String(64), nullable=False, default=""),
    Column("model", String(320), nullable=False, default=""),
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("cached_tokens", BigInteger, nullable=False, default=0),
    Column("completion_tokens", BigInteger, nullable=False, default=0),
    Column("amount", Money, nullable=False, default="0"),
    Column("currency", String(3), nullable=False, default=""),
    Column("reason", Text, nullable=False),
    Column("author", String(253), nullable=False),
)

invoice = Table(
    "invoice",
    metadata,
    Column("project", String(63), nullable=False),
    Column("month", String(7), nullable=False, comment="2026-11"),
    Column("closed_unix_s", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("document", Text, nullable=False, comment="JSON of all lines, from which HTML and CSV are made"),
    PrimaryKeyConstraint("project", "month"),
)
"""Closed months. Never changed: what comes later is a correction in an open month."""

# --- sums --------------------------------------------------------------------------------


def _usage_sum(name: str, start: str, *, keys: bool = True) -> Table:
    by_key = [Column("key_uid", String(64), nullable=False)] if keys else []
    return Table(
        name,
        metadata,
        Column(start, BigInteger, nullable=False),
        Column("project", String(63), nullable=False),
        *by_key,
        Column("base", String(320), nullable=False),
        Column("uid", String(64), nullable=False),
        Column("model", String(320), nullable=False),
        Column("outcome", String(16), nullable=False, comment="billing.Billed"),
        Column("requests", BigInteger, nullable=False),
        *_tokens(),
        Column("billed_prompt_tokens", BigInteger, nullable=False, comment="without the cached ones"),
        Column("billed_cached_tokens", BigInteger, nullable=False),
        Column("billed_completion_tokens", BigInteger, nullable=False),
        Column("delivered_tokens", BigInteger, nullable=False),
        PrimaryKeyConstraint(start, "project", *(column.name for column in by_key), "base", "uid", "model", "outcome"),
        Index(f"{name}_by_project", "project", start),
    )


usage_hour = _usage_sum("usage_hour", "hour_unix_s")
usage_day = _usage_sum("usage_day", "day_unix_s")
"""Requests by the time at which they ended, joined with their gateway halves."""
model_day = _usage_sum("model_day", "day_unix_s", keys=False)
"""`usage_day` summed over keys: pages about all projects stay fast with 100,000 keys."""
model_span = _usage_sum("model_span", "day_unix_s", keys=False)


def _pod_sum(name: str, start: str) -> Table:
    return Table(
        name,
        metadata,
        Column(start, BigInteger, nullable=False),
        Column("boot", Id, ForeignKey("boot.id"), nullable=False),
        Column("uid", String(64), nullable=False, comment="empty: the base; *: the pod as a whole"),
        Column("model", String(320), nullable=False),
        Column("uptime_ns", BigInteger, nullable=False),
        Column("gpu_ns", BigInteger, nullable=False),
        Column("byte_ns", Wide, nullable=False),
        PrimaryKeyConstraint(start, "boot", "uid"),
        Index(f"{name}_by_account", "uid", start),
    )


pod_hour = _pod_sum("pod_hour", "hour_unix_s")
pod_day = _pod_sum("pod_day", "day_unix_s")
"""Minutes of pods, by account. The row of the whole pod has its uptime and its busy time; that of a day also has the
bytes of all adapters together.
"""
pod_span = _pod_sum("pod_span", "day_unix_s")

SPAN_S = 8 * 86400
"""Length of a span; spans begin at multiples of it."""
span = Table("span", metadata, Column("day_unix_s", BigInteger, primary_key=True, comment="the first day"))
"""Spans of days whose sums are made: `model_span` and `pod_span` have them, of whole spans each. A reader of many days
trusts what is listed here, for a span goes with the transaction that replaces one of its days; it is made again later.
"""

dirty_hour = Table(
    "dirty_hour",
    metadata,
    Column("hour_unix_s", BigInteger, primary_key=True),
    Column("marked", BigInteger, nullable=False, comment="grows with every mark"),
)
"""Hours whose sums are older than their facts."""

finding = Table(
    "finding",
    metadata,
    Column("check", String(8), nullable=False, comment="R1 to R5"),
    Column("subject", String(400), nullable=False, comment="process, account, attempt or hour"),
    Column("tokens", BigInteger, nullable=False, comment="by how many tokens the two sides differ"),
    Column("message", Text, nullable=False),
    Column("found_unix_s", BigInteger, nullable=False),
    PrimaryKeyConstraint("check", "subject"),
)
"""Where the reconciliation does not add up at present. Replaced by each run."""

mark = Table(
    "mark",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""How far a continuous task has come, such as a check of the reconciliation."""

# --- quotas ------------------------------------------------------------------------------

reservation = Table(
    "reservation",
    metadata,
    Column("gateway", Id, ForeignKey("gateway.id"), nullable=False),
    Column("scope", String(400), nullable=False, comment="key/<uid>, project/<namespace> or model/<namespace>/<name>"),
    Column("meter", String(32), nullable=False, comment="requests, tokens, month_tokens, month_money"),
    Column("leased", Money, nullable=False),
    Column("consumed", BigInteger, nullable=False, default=0, comment="by this gateway process, as it last reported"),
    Column("used", BigInteger, nullable=False, default=0, comment="of the budget in the month, when this was written"),
    Column("until_unix_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("gateway", "scope", "meter"),
)
"""What gateways hold of budgets until it is settled or expires."""

quota_use = Table(
    "quota_use",
    metadata,
    Column("scope", String(400), nullable=False, comment="as in reservation"),
    Column("meter", String(32), nullable=False, comment="as in reservation"),
    Column("most", BigInteger, nullable=False, comment="the quota"),
    Column("used", BigInteger, nullable=False, comment="when this was noted; a rate is refilled since"),
    Column("noted_unix_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("scope", "meter"),
)
"""The use of quotas as the replica that leases sees it, for the console of the others."""

# --- sinks -------------------------------------------------------------------------------

outbox = Table(
    "outbox",
    metadata,
    Column("id", Id, primary_key=True),
    Column("sink", String(63), nullable=False),
    Column("event_id", String(200), nullable=False, comment="attempt and meter: the same at every delivery"),
    Column("body", Text, nullable=False),
    Column("next_unix_s", BigInteger, nullable=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("error", Text, nullable=False, default=""),
    Index("outbox_event", "sink", "event_id", unique=True),
    Index("outbox_due", "sink", "next_unix_s"),
)

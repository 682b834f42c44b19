"""The ledger's requests of a period as files: JSON lines and CSV, with a manifest of their sums and digests.

`python -m lorapool_ledger export` calls it. A line is a request as it is billed: its runtime's half joined with its
gateway's, or a remainder of several. The sums by hour are made by the same rules, so that a count of the files by any
other program has to arrive at the same totals.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, func, select

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.billing.billed import GatewayHalf, Result, RuntimeHalf, result_of
from lorapool_ledger.intake.runtime_page import GONE
from lorapool_ledger.store.tables import attempt_closed, attempt_opened, boot, runtime_request
from lorapool_ledger.sums.joined import GATEWAY_SIDE, closed_alone_in, ended_in

TEXTS = ("attempt", "request_id", "project", "api_key_id", "base", "model", "adapter_uid", "outcome", "source")
TIMES = ("started_unix_ms", "ended_unix_ms")
COUNTS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "billed_prompt_tokens",
    "billed_cached_tokens",
    "billed_completion_tokens",
    "delivered_tokens",
    "gpu_ns",
)
COLUMNS = (*TEXTS, *TIMES, *COUNTS)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
FETCH = 5000
"""Rows that are in memory at one time."""


@dataclass(frozen=True, slots=True)
class Exported:
    rows: int
    sums: dict[str, int]
    """By name of the count."""


def export(connection: Connection, folder: Path, start_s: int, end_s: int) -> Exported:
    """Writes `requests.jsonl`, `requests.csv` and `manifest.json` of what ended in [start, end), in Unix seconds.

    The manifest is written last: an export without one is not complete. Raises OSError, also for files that are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = dict.fromkeys(COUNTS, 0)
    projects: dict[str, dict[str, int]] = {}
    rows = 0
    names = ("requests.jsonl", "requests.csv")
    with (folder / names[0]).open("x") as lines, (folder / names[1]).open("x", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(COLUMNS)
        for row in _rows(connection, start_s, end_s):
            lines.write(json.dumps(row, separators=(",", ":")) + "\n")
            writer.writerow([guarded(row[name]) for name in COLUMNS])
            rows += 1
            of_project = projects.setdefault(row["project"], dict.fromkeys(COUNTS, 0))
            for name in COUNTS:
                sums[name] += row[name]
                of_project[name] += row[name]
    manifest = {
        "from_unix_s": start_s,
        "to_unix_s": end_s,
        "rows": rows,
        "sums": sums,
        "projects": projects,
        "files": {name: _digest(folder / name) for name in names},
    }
    with (folder / "manifest.json").open("x") as file:
        _write(file, manifest)
    return Exported(rows, sums)


def guarded(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front. Numbers stay numbers."""
    return "'" + value if isinstance(value, str) and value.startswith(FORMULA) else value


def _write(file: IO[str], manifest: dict[str, Any]) -> None:
    json.dump(manifest, file, indent=2)
    file.write("\n")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _rows(connection: Connection, start_s: int, end_s: int) -> Iterator[dict[str, Any]]:
    half, closed, opened = runtime_request.c, attempt_closed.c, attempt_opened.c
    joined = runtime_request.join(boot, boot.c.id == half.boot).outerjoin(
        attempt_closed, (closed.attempt == half.attempt) & (half.attempt != "")
    )
    runtimes = (
        select(
            runtime_request,
            boot.c.base,
            closed.outcome.label("closed"),
            closed.completion_tokens.label("delivered"),
        )
        .select_from(joined)
        .where(ended_in(start_s, end_s))
        .order_by(half.ended_unix_ms, half.boot, half.seq)
    )
    for row in connection.execution_options(yield_per=FETCH).execute(runtimes):
        counts = row.prompt_tokens, row.cached_tokens, row.completion_tokens
        reported = GatewayHalf(AttemptEnd(row.closed), completion_tokens=row.delivered) if row.closed else None
        result = result_of(RuntimeHalf(Ended(row.outcome), *counts, row.gpu_ns), reported)
        yield _line(row, row.requests, result, row.started_unix_ms, row.ended_unix_ms)
    alone = (
        select(
            attempt_opened,
            closed.outcome.label("closed"),
            closed.prompt_tokens,
            closed.cached_tokens,
            closed.completion_tokens,
            closed.closed_unix_ms,
            func.coalesce(boot.c.end == GONE, False).label("gone"),
        )
        .select_from(GATEWAY_SIDE)
        .where(closed_alone_in(start_s, end_s))
        .order_by(closed.closed_unix_ms, opened.attempt)
    )
    for row in connection.execution_options(yield_per=FETCH).execute(alone):
        reported = GatewayHalf(AttemptEnd(row.closed), row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        result = result_of(None, reported, runtime_gone=bool(row.gone))
        yield _line(row, 1, result, row.opened_unix_ms, row.closed_unix_ms)


def _line(row: Any, requests: int, result: Result, started_ms: int, ended_ms: int) -> dict[str, Any]:
    texts = (
        *(row.attempt, row.request_id, row.project, row.key_uid, row.base, row.model, row.uid),
        *(result.outcome.value, result.source.value),
    )
    counts = (
        requests,
        result.prompt_tokens,
        result.cached_tokens,
        result.completion_tokens,
        result.billed_prompt_tokens,
        result.billed_cached_tokens,
        result.billed_completion_tokens,
        result.delivered_tokens,
        result.gpu_ns,
    )
    return dict(zip(COLUMNS, (*texts, started_ms, ended_ms, *counts), strict=True))

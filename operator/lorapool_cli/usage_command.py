"""`lorapool usage`: usage and costs of a release as a table or CSV, from its gateway, by an API key.

It asks what OpenAI's client would ask, page by page, and needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

ENVIRONMENT_URL, ENVIRONMENT_KEY = "LORAPOOL_URL", "LORAPOOL_API_KEY"
TIMEOUT_S = 60.0
DAY = 86400
MAX_PAGES = 10_000
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
GROUPS = {"project": "project_id", "key": "api_key_id", "model": "model"}
EXIT_REFUSED, EXIT_UNREACHABLE = 1, 3

Get = Callable[[str, Sequence[tuple[str, str]]], dict[str, Any]]
"""Asks for a path with a query and returns the JSON."""


class UsageError(Exception):
    """What keeps the command from its work, with the remedy."""

    def __init__(self, message: str, code: int = EXIT_REFUSED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Row:
    """One line of the table."""

    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    amounts: dict[str, Decimal] = field(default_factory=dict)
    """By currency."""


def main(argv: Sequence[str], *, now: Callable[[], float] = time.time, out: TextIO | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    stream = sys.stdout if out is None else out
    try:
        start, end = _period(given.since, given.until, now())
        get = _client(_url(given.url), _key(given.key_file))
        by = list(dict.fromkeys(given.by.split(","))) if given.by else []
        if unknown := [name for name in by if name not in (*GROUPS, "day")]:
            raise UsageError(f"--by {unknown[0]}: choose some of day, {', '.join(GROUPS)}.")
        filters = [("project_ids", name) for name in given.project] + [("api_key_ids", name) for name in given.key]
        rows = read_rows(get, start, end, by, filters, given.model)
        (write_csv if given.csv else write_table)(rows, by, stream)
    except UsageError as error:
        print(f"lorapool usage: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:
        return 0
    return 0


def read_rows(
    get: Get, start: int, end: int, by: Sequence[str], filters: Sequence[tuple[str, str]], models: Sequence[str]
) -> dict[tuple[str, ...], Row]:
    """Usage and costs by the values of `by`, in order."""
    period = [("start_time", str(start)), ("end_time", str(end)), *filters]
    groups = [("group_by", GROUPS[name]) for name in by if name != "day"]
    rows: dict[tuple[str, ...], Row] = {}

    def row(bucket: Mapping[str, Any], result: Mapping[str, Any], model: str | None) -> Row:
        values = {"day": _day(bucket["start_time"]), "model": model or ""}
        names = tuple(values[name] if name in values else str(result.get(GROUPS[name]) or "") for name in by)
        return rows.setdefault(names, Row())

    usage = [*period, ("limit", "31"), *groups, *(("models", name) for name in models)]
    for bucket, result in _results(get, "/v1/organization/usage/completions", usage):
        found = row(bucket, result, result.get("model"))
        found.requests += result["num_model_requests"]
        found.input_tokens += result["input_tokens"]
        found.cached_tokens += result.get("input_cached_tokens") or 0
        found.output_tokens += result["output_tokens"]
    by_item = "model" in by or bool(models)
    costs = [*period, ("limit", "180"), *(item for item in groups if item[1] != "model")]
    costs += [("group_by", "line_item")] if by_item else []
    for bucket, result in _results(get, "/v1/organization/costs", costs):
        model = (result.get("line_item") or "").rpartition(", ")[0]
        if models and model not in models:
            continue
        amount, found = result["amount"], row(bucket, result, model)
        currency = amount["currency"].upper()
        found.amounts[currency] = found.amounts.get(currency, Decimal(0)) + Decimal(str(amount["value"]))
    return dict(sorted(rows.items()))


def write_csv(rows: Mapping[tuple[str, ...], Row], by: Sequence[str], out: TextIO) -> None:
    """Exact numbers; no cell is a formula."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*by, "requests", "input_tokens", "cached_tokens", "output_tokens", "cost", "currency"])
    for names, row in rows.items():
        cells = ["'" + name if name.startswith(FORMULA) else name for name in names]
        counts = [row.requests, row.input_tokens, row.cached_tokens, row.output_tokens]
        for currency, amount in sorted(row.amounts.items()) or [("", Decimal(0))]:
            writer.writerow([*cells, *counts, f"{amount:f}", currency])
            counts = [0, 0, 0, 0]  # counted once where there are several currencies


def write_table(rows: Mapping[tuple[str, ...], Row], by: Sequence[str], out: TextIO) -> None:
    """A table for people, with a line of totals."""
    head = [*by, "requests", "input", "cached", "output", "cost"]
    total = Row()
    for row in rows.values():
        total.requests += row.requests
        total.input_tokens += row.input_tokens
        total.cached_tokens += row.cached_tokens
        total.output_tokens += row.output_tokens
        for currency, amount in row.amounts.items():
            total.amounts[currency] = total.amounts.get(currency, Decimal(0)) + amount
    lines = [[*(_visible(name) or "–" for name in names), *_cells(row)] for names, row in rows.items()]
    if by:
        lines.append([*(["total"] + [""] * (len(by) - 1)), *_cells(total)])
    elif not lines:
        lines.append(_cells(total))
    widths = [max(len(line[place]) for line in [head, *lines]) for place in range(len(head))]
    for line in [head, *lines]:
        cells = [
            cell.ljust(width) if place < len(by) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=out)


def _cells(row: Row) -> list[str]:
    counts = [f"{value:,}" for value in (row.requests, row.input_tokens, row.cached_tokens, row.output_tokens)]
    return [*counts, " + ".join(_amount(value, name) for name, value in sorted(row.amounts.items())) or "0"]


def _amount(value: Decimal, currency: str) -> str:
    places = 2 if value == 0 or abs(value) >= 1 else max(2, 2 - value.adjusted())
    return f"{round(value, places):,f} {currency}"


def _visible(text: str) -> str:
    """The text without characters that would change what a terminal shows."""
    return "".join(char if char.isprintable() else f"[U+{ord(char):04X}]" for char in text)


def _results(
    get: Get, path: str, query: Sequence[tuple[str, str]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """All results of all pages, with their buckets."""
    page: list[tuple[str, str]] = []
    for _ in range(MAX_PAGES):
        body = get(path, [*query, *page])
        for bucket in body["data"]:
            for result in bucket["results"]:
                yield bucket, result
        if not body["has_more"]:
            return
        page = [("page", body["next_page"])]
    raise UsageError(f"{path} has more than {MAX_PAGES} pages; choose a shorter period with --since and --until.")


def _client(url: str, key: str) -> Get:
    def get(path: str, query: Sequence[tuple[str, str]]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{url}{path}?{urllib.parse.urlencode(query)}", headers={"Authorization": f"Bearer {key}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise UsageError(_refusal(error, url)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(
                f"{url} does not answer as a gateway does: {reason}. Check --url and that the gateway can be reached.",
                EXIT_UNREACHABLE,
            ) from None
        if not isinstance(found, dict) or not {"data", "has_more"} <= found.keys():
            raise UsageError(f"{url} is no gateway of Lorapool: it answered something else.", EXIT_UNREACHABLE)
        return found

    return get


def _refusal(error: urllib.error.HTTPError, url: str) -> str:
    try:
        message = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        message = ""
    remedies = {
        401: f"Check the key in {ENVIRONMENT_KEY} or --key-file.",
        403: "Ask the administrator for a key that may read usage.",
        404: "Check --url; the release needs `ledger.enabled`.",
        503: "Try again in some seconds.",
    }
    return " ".join(part for part in (f"{url} answered {error.code}.", message, remedies.get(error.code, "")) if part)


def _period(since: str, until: str | None, now_unix_s: float) -> tuple[int, int]:
    """Whole UTC days. Raises UsageError."""
    tomorrow = int(now_unix_s) // DAY * DAY + DAY
    if found := re.fullmatch(r"([1-9][0-9]{0,3})d", since):
        start = tomorrow - int(found[1]) * DAY
    elif re.fullmatch(r"[0-9]{4}-[0-9]{2}", since):
        start = _unix_s(since + "-01", "--since")
    else:
        start = _unix_s(since, "--since")
    end = tomorrow if until is None else _unix_s(until, "--until") + DAY
    if end <= start:
        raise UsageError("The period is empty: --until is before --since, or --since is in the future.")
    return start, end


def _unix_s(day: str, option: str) -> int:
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", day):
            raise ValueError
        return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise UsageError(f"{option} {day}: write a day such as 2026-11-01, in UTC.") from None


def _day(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")


def _url(given: str | None) -> str:
    url = (given or os.environ.get(ENVIRONMENT_URL, "")).rstrip("/").removesuffix("/v1")
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
        raise UsageError(f"Name the gateway with --url https://… or in {ENVIRONMENT_URL}.")
    return url


def _key(file: Path | None) -> str:
    try:
        key = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(ENVIRONMENT_KEY, "")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The key file {file} cannot be read: {error}.") from None
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(f"Put an API key into {ENVIRONMENT_KEY}, or into a file that --key-file names.")
    return key


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorapool usage", description="Reports billed tokens, requests and costs, by whole UTC days."
    )
    parser.add_argument("--url", help=f"URL of the gateway; by default {ENVIRONMENT_URL} of the environment")
    parser.add_argument(
        "--key-file",
        type=Path,
        help=f"file with an API key; by default the key in {ENVIRONMENT_KEY} of the environment",
    )
    parser.add_argument(
        "--since", default="30d", help="first day (2026-11-01), month (2026-11) or length (30d, the default)"
    )
    parser.add_argument("--until", help="last day; by default today")
    parser.add_argument(
        "--by", default="model", metavar="A,B", help="some of day, project, key, model; empty: one line"
    )
    for name in GROUPS:
        parser.add_argument(f"--{name}", action="append", default=[], help=f"only this {name}; may be repeated")
    parser.add_argument("--csv", action="store_true", help="write CSV with exact numbers instead of a table")
    return parser

"""Parses the query of a usage or costs call. Pure. Every mistake is an InvalidRequestError that names the parameter."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lorapool_api.openai import InvalidRequestError
from lorapool_ledger.reports.periods import DAY, Period, Width

MAX_VALUES = 100
"""Values of one filter at most."""
MAX_VALUE_CHARS = 400
MAX_AHEAD_S = 366 * DAY
"""A time that is further in the future is a mistake, most likely milliseconds."""

T = TypeVar("T")

USAGE_GROUPS = ("project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source")
COST_GROUPS = ("project_id", "user_id", "line_item", "api_key_id", "api_source")
LIMITS = {Width.DAY: (7, 31), Width.HOUR: (24, 168), Width.MINUTE: (60, 1440)}
"""Default and maximum of `limit` for usage."""
COST_LIMIT = (7, 180)


class Params(Protocol):
    """The decoded parameters of a URL, of which each may be given several times."""

    def keys(self) -> object: ...
    def getall(self, name: str, default: list[str], /) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked for. None of a filter: no filter."""

    start_unix_s: int
    end_unix_s: int | None
    """None: up to now."""
    width: Width
    limit: int
    group_by: tuple[str, ...]
    projects: frozenset[str] | None
    keys: frozenset[str] | None
    models: frozenset[str] | None
    line_items: frozenset[str] | None
    batch: bool | None
    page: str | None

    @property
    def digest(self) -> str:
        """Equal for calls that may continue each other's pages: `limit` and `page` may differ."""
        filters = [None if item is None else sorted(item) for item in (self.projects, self.keys, self.models)]
        items = None if self.line_items is None else sorted(self.line_items)
        about = [self.start_unix_s, self.end_unix_s, self.width, self.group_by, filters, items, self.batch]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]

    def period(self, end_unix_s: int) -> Period:
        """The whole buckets from the start to the end."""
        return Period(self.start_unix_s, end_unix_s).aligned(self.width)


def usage_call(params: Params, now_unix_s: float) -> Call:
    """Raises InvalidRequestError."""
    return _call(params, now_unix_s, groups=USAGE_GROUPS, filters={"models", "batch"}, widths=tuple(Width))


def costs_call(params: Params, now_unix_s: float) -> Call:
    """Raises InvalidRequestError."""
    return _call(params, now_unix_s, groups=COST_GROUPS, filters={"line_items"}, widths=(Width.DAY,))


def _call(
    params: Params, now_unix_s: float, *, groups: tuple[str, ...], filters: set[str], widths: tuple[Width, ...]
) -> Call:
    given = _values(params)
    known = {"start_time", "end_time", "bucket_width", "limit", "page", "group_by", "project_ids", "api_key_ids"}
    if unknown := sorted(given.keys() - known - filters - {"user_ids"}):
        raise InvalidRequestError(
            f"{unknown[0][:64]!r} is no parameter of this call; it has {', '.join(sorted(known | filters))}.",
            param=unknown[0][:64],
        )
    if "user_ids" in given:
        raise InvalidRequestError(
            "user_ids: usage belongs to API keys and projects, not to users. Filter by api_key_ids.", param="user_ids"
        )
    width = _choice(given, "bucket_width", {item.value: item for item in widths}, Width.DAY)
    default, most = LIMITS[width] if "models" in filters else COST_LIMIT
    latest = int(now_unix_s) + MAX_AHEAD_S
    start = _number(given, "start_time", 0, latest)
    if start is None:
        raise InvalidRequestError(
            "start_time is missing: the first second of the period, in Unix time.", param="start_time"
        )
    end = _number(given, "end_time", 0, latest)
    if end is not None and end <= start:
        raise InvalidRequestError("end_time must be after start_time; it is exclusive.", param="end_time")
    if end is None and start > now_unix_s:
        raise InvalidRequestError("start_time is in the future; give an end_time after it.", param="start_time")
    limit = _number(given, "limit", 1, most)
    return Call(
        start_unix_s=start,
        end_unix_s=end,
        width=width,
        limit=default if limit is None else limit,
        group_by=_groups(given, groups),
        projects=_filter(given, "project_ids"),
        keys=_filter(given, "api_key_ids"),
        models=_filter(given, "models"),
        line_items=_filter(given, "line_items"),
        batch=_choice(given, "batch", {"true": True, "false": False}, None),
        page=_single(given, "page"),
    )


def _values(params: Params) -> dict[str, list[str]]:
    """All values by name: OpenAI's clients write lists as `name[]`, others repeat the plain name."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(params.keys()):  # type: ignore[call-overload]
        found.setdefault(str(name).removesuffix("[]"), []).extend(params.getall(name, []))
    return found


def _single(given: Mapping[str, list[str]], name: str) -> str | None:
    values = given.get(name)
    if values is None:
        return None
    if len(values) != 1:
        raise InvalidRequestError(f"{name} is given {len(values)} times.", param=name)
    return values[0]


def _number(given: Mapping[str, list[str]], name: str, least: int, most: int) -> int | None:
    text = _single(given, name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
        what = "a Unix time in whole seconds" if name.endswith("_time") else "a number"
        raise InvalidRequestError(f"{name} must be {what} from {least} to {most}.", param=name)
    return int(text)


def _choice(given: Mapping[str, list[str]], name: str, choices: Mapping[str, T], default: T) -> T:
    text = _single(given, name)
    if text is None:
        return default
    if text not in choices:
        raise InvalidRequestError(f"{name} must be one of {', '.join(choices)}.", param=name)
    return choices[text]


def _groups(given: Mapping[str, list[str]], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in given.get("group_by", ()):
        if name not in known:
            raise InvalidRequestError(f"group_by must be some of {', '.join(known)}.", param="group_by")
    return tuple(name for name in known if name in given.get("group_by", ()))


def _filter(given: Mapping[str, list[str]], name: str) -> frozenset[str] | None:
    values = given.get(name)
    if values is None:
        return None
    if len(values) > MAX_VALUES or any(len(value) > MAX_VALUE_CHARS for value in values):
        raise InvalidRequestError(
            f"{name} may have {MAX_VALUES} values of {MAX_VALUE_CHARS} characters at most.", param=name
        )
    return frozenset(values)

"""The list of sinks, `sinks.yaml`. Parsed once at the door; mistakes are sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import yaml

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?")
_KEY = re.compile(r"[-._a-zA-Z0-9]+")


class SinksError(ValueError):
    """The list cannot be used. `lines` has one sentence per mistake."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class SinkType(StrEnum):
    CLOUDEVENTS = "cloudevents"
    """CloudEvents 1.0 over HTTP in batches, which OpenMeter and others take."""
    LAGO = "lago"
    """Batches of Lago's events."""
    STRIPE = "stripe"
    """Stripe's meter events, one a request."""


class Meter(StrEnum):
    """What is counted of a billed attempt, and corrections."""

    PROMPT_TOKENS = "prompt_tokens"
    """Without the cached ones."""
    CACHED_TOKENS = "cached_tokens"
    COMPLETION_TOKENS = "completion_tokens"
    REQUESTS = "requests"
    CORRECTIONS = "corrections"
    """Amounts that were added to a bill or taken off. Stripe's meters count whole units, so it gets none."""


@dataclass(frozen=True, slots=True)
class Sink:
    name: str
    type: SinkType
    url: str
    """Where events are posted, with its path."""
    token_key: str = ""
    """File in the folder of secrets; empty: no Authorization header."""
    meters: tuple[Meter, ...] = tuple(Meter)
    subjects: tuple[tuple[str, str], ...] = ()
    """The sink's customer or subscription of a project; a project that is not listed stands for itself."""

    def subject(self, project: str) -> str:
        return dict(self.subjects).get(project, project)


def parse_sinks(text: str) -> tuple[Sink, ...]:
    """Reads the list. Raises SinksError."""
    mistakes: list[str] = []
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SinksError([f"the list of sinks is not YAML: {' '.join(str(error).split())}"]) from None
    entries = found.get("sinks") or [] if isinstance(found, dict) else None
    if not isinstance(entries, list) or found.keys() - {"sinks"}:
        raise SinksError(["the list of sinks has to be a mapping with the list `sinks` alone"])
    sinks = [sink for number, entry in enumerate(entries) if (sink := _sink(f"sinks[{number}]", entry, mistakes))]
    if len(names := [sink.name for sink in sinks]) != len(set(names)):
        mistakes.append("two sinks have the same name")
    if mistakes:
        raise SinksError(mistakes)
    return tuple(sinks)


def _sink(where: str, entry: Any, mistakes: list[str]) -> Sink | None:
    if not isinstance(entry, dict):
        mistakes.append(f"{where} has to be a mapping")
        return None
    before = len(mistakes)
    known = ("name", "type", "url", "tokenKey", "meters", "subjects")
    mistakes += [f"{where}.{key} is unknown; known are {', '.join(known)}" for key in entry if key not in known]
    name, url, key = (str(entry.get(name, "")) for name in ("name", "url", "tokenKey"))
    if not _NAME.fullmatch(name):
        mistakes.append(f"{where}.name {name!r} has to be 1 to 30 of a-z, 0-9 and -")
    if entry.get("type") not in list(SinkType):
        mistakes.append(f"{where}.type has to be one of {', '.join(SinkType)}")
    if not _is_url(url):
        mistakes.append(f"{where}.url has to be an http:// or https:// address without a user or password")
    if key and (not _KEY.fullmatch(key) or set(key) == {"."}):
        mistakes.append(f"{where}.tokenKey {key!r} has to be a key of the Secret")
    meters = entry.get("meters") or list(Meter)
    if not isinstance(meters, list) or any(meter not in list(Meter) for meter in meters):
        mistakes.append(f"{where}.meters has to be a list of {', '.join(Meter)}")
    elif entry.get("type") == SinkType.STRIPE and Meter.CORRECTIONS in (entry.get("meters") or ()):
        mistakes.append(f"{where}.meters: Stripe has no event for corrections; enter them there as credit notes")
    subjects = entry.get("subjects") or {}
    if not isinstance(subjects, dict) or not all(isinstance(one, str) for pair in subjects.items() for one in pair):
        mistakes.append(f"{where}.subjects has to map projects to texts")
    if len(mistakes) > before:
        return None
    ordered = tuple(meter for meter in Meter if meter in meters)
    return Sink(name, SinkType(entry["type"]), url, key, ordered, tuple(subjects.items()))


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return False

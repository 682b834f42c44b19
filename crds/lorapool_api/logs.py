"""Log lines of every process, with the same keys: JSON for machines, text for people.

What belongs to a line is passed as `extra` and becomes a field of its own. Secrets are never passed to a logger, so
nothing is redacted here.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["auto", "json", "text"]

FIELDS = {
    "adapter": "namespace/name of a LoraAdapter, or its uid where the name is not known",
    "api_key": "name of the Secret of an API key",
    "adapters": "number of LoraAdapters",
    "answered": "target that a runtime named in its response",
    "attention_bytes": "device memory that the attention of a step takes",
    "base": "namespace/name of a BaseModel",
    "bases": "number of BaseModels",
    "bytes": "size of what is fetched",
    "code": "HTTP status",
    "compared_steps": "number of steps whose results were compared with those of the plain path",
    "compiled_here": "whether this process compiled it",
    "digest": "digest of an artifact",
    "error": "what failed, in one sentence",
    "folder": "folder of files, such as the base's",
    "free_bytes": "device memory that was free",
    "freed_bytes": "device memory that unloading freed",
    "identity": "holder of the Lease",
    "in_flight": "requests in flight",
    "loaded": "adapters that a new pod has loaded before it is ready",
    "isa": "instruction set of the native kernels",
    "job": "namespace/name of a FineTuneJob",
    "route": "path of a request",
    "kind": "kind of `object`",
    "object": "namespace/name of a Kubernetes object",
    "operators": "number of operators in the decode program",
    "owner": "owner of an API key, as its Secret says",
    "reason": "reason as in the object's conditions",
    "remote": "address of the client",
    "replica": "name of a runtime pod",
    "request_id": "value of the X-Request-Id header",
    "seconds": "duration",
    "sizes": "batch sizes of the captured decode graphs",
    "slot": "number of an adapter slot",
    "step": "optimiser step of a FineTuneJob",
    "step_bytes": "device memory that a step takes, without its attention",
    "tokens": "number of bearer tokens that are valid",
    "verified_conditions": "number of conditions under which the decode program was verified",
    "watched_namespace": "namespace whose objects are watched; empty for the whole cluster",
    "wanted": "adapters that a new pod is to load before it is ready",
}
"""Every field that a line may have of its own, so that one thing has the same name in all processes."""

_AUDIT = logging.getLogger("lorapool.audit")
_AUDIT.setLevel(logging.INFO)


def audit(message: str, *args: object, **fields: object) -> None:
    """Logs who was refused, or who changed what, whatever the log level is; `fields` are names of FIELDS."""
    _AUDIT.info(message, *args, extra=fields)


_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "settings", "k8s_skip"}
"""Attributes that are not fields of a line: those of every record, and two that kopf adds for its own handlers."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, process, the line's own fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._process,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then the line's own fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname:7} {record.name}: {record.getMessage()}"
        text = " ".join([head, *(f"{name}={_shown(value)}" for name, value in _fields(record).items())])
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def set_up_logs(process: str, level: str, log_format: LogFormat, *, quiet: Iterable[str] = ()) -> None:
    """Gives the root logger its only handler, on standard error. The `quiet` loggers only report warnings."""
    handler = logging.StreamHandler(sys.stderr)
    text = sys.stderr.isatty() if log_format == "auto" else log_format == "text"
    handler.setFormatter(TextFormatter() if text else JsonFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    """UTC in RFC 3339 with milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _shown(value: object) -> str:
    """Values with spaces or line ends are quoted, so that a field ends where its value does."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)

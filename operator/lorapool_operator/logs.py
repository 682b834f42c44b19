"""Log lines: JSON in a cluster, plain text at a desk, the same keys everywhere. Called once by `__main__`.

Extras of a record become fields. Nothing secret is ever passed to a logger; nothing is redacted here.
"""

from __future__ import annotations

import json
import logging
import sys

from lorapool_operator.clock import iso_micro

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "settings", "k8s_skip"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": iso_micro(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_extras(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{name}={value}" for name, value in _extras(record).items())
        text = (
            f"{iso_micro(record.created)} {record.levelname:7} {record.name}: {record.getMessage()} {extras}".rstrip()
        )
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def set_up_logs(level: str, form: str) -> None:
    """The root logger's only handler; kopf's lines for each event and login are dropped."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("kopf", "kubernetes.aio", "aiohttp.access", "urllib3", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}

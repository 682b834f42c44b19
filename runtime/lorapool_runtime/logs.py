"""Log lines for people and machines: time, level, sentence, then key=value of what belongs to it.

Set up once in `__main__`. Same keys everywhere: adapter, base, digest, request_id.
"""

from __future__ import annotations

import logging
import sys

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{key}={value}" for key, value in vars(record).items() if key not in _PLAIN)
        line = super().formatMessage(record)
        return f"{line} {extras}" if extras else line


def set_up(level: str) -> None:
    """Everything to standard error, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)

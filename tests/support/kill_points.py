"""`python kill_points.py gateway|ledger POINT COUNT`: a process that kills itself when it comes to a point of its work.

The product has no hooks for this: the functions before and after which a kill matters are wrapped here.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

GATEWAY = (
    "before open",
    "after open",
    "before close",
    "after close",
    "before send",
    "after send",
    "after truncate",
)
LEDGER = (
    "before commit",
    "after commit",
    "before acknowledge",
    "after acknowledge",
    "before sum",
    "after sum",
    "before day",
)


class Point:
    def __init__(self, name: str, count: int) -> None:
        self.name, self.left = name, count

    def come_to(self, name: str) -> None:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, function: str, before: str = "", after: str = "") -> None:
        """Comes to these points before and after each call of a function."""
        true: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(true)
        def called(*given: Any, **named: Any) -> Any:
            self.come_to(before)
            result = true(*given, **named)
            self.come_to(after)
            return result

        @functools.wraps(true)
        async def awaited(*given: Any, **named: Any) -> Any:
            self.come_to(before)
            result = await true(*given, **named)
            self.come_to(after)
            return result

        setattr(owner, function, awaited if inspect.iscoroutinefunction(true) else called)


def gateway(point: Point) -> None:
    import lorapool_gateway.__main__ as process
    from lorapool_gateway.ledger.attempts import Attempt, Attempts
    from lorapool_gateway.ledger.journal import Journal
    from lorapool_gateway.ledger.sender import Sender

    point.around(Attempts, "open", "before open", "after open")
    point.around(Attempt, "close", "before close", "after close")
    point.around(Sender, "_send", "before send", "after send")
    point.around(Journal, "cut", "", "after truncate")
    process.main()


def ledger(point: Point) -> None:
    import lorapool_ledger.__main__ as process
    from lorapool_ledger.intake import attempts_api, pulls
    from lorapool_ledger.store.database import Database
    from lorapool_ledger.sums import rollups

    for module in (attempts_api, pulls):
        point.around(module, "take", "", "before commit")  # the last statement of its transaction
    point.around(pulls.Pulls, "acknowledge", "before acknowledge", "after acknowledge")
    point.around(rollups, "replace_hour", "before sum", "after sum")
    point.around(rollups, "replace_day", "before day")
    point.around(Database, "_transaction", "", "after commit")
    process.main()


if __name__ == "__main__":
    program, name, count = sys.argv[1:]
    del sys.argv[1:]  # they are not the program's
    {"gateway": gateway, "ledger": ledger}[program](Point(name, int(count)))

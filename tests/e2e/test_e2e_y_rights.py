"""After all the tests before: every process lived within the chart's own rights, in a strict namespace."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from e2e_world import World

SETTLING_S = 20.0
"""An API server that a test has just started again knows no roles yet, and forbids for a moment what it then allows."""


REFUSED = re.compile(r"forbidden|(?:status|code|reason|http/[\d.]+)\W{1,4}403\b|\(403\)|\" 403\b", re.IGNORECASE)
"""In words, or as a status where one is written; a 403 that is a duration, a count or an address is none."""


def _settling(world: World, timestamp: str) -> bool:
    at_unix_s = datetime.fromisoformat(timestamp).timestamp()
    return any(0 <= at_unix_s - start < SETTLING_S for start in world.starts_unix_s)


def _asked(event: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Who wanted to do what to which kind of object: what one right allows or does not."""
    ref = event.get("objectRef", {})
    kind = (ref.get("apiGroup", ""), ref.get("resource", ""), ref.get("subresource", ""))
    return (event["user"]["username"], event["verb"], *kind)


def forbidden(world: World, events: list[dict[str, Any]]) -> list[str]:
    """Every 403, but for one right after a restart whose like was allowed at another time: that right is there."""
    allowed = {_asked(event) for event in events if event["responseStatus"]["code"] < 400}
    return [
        f"{event['user']['username']} {event['verb']} {event['requestURI']}"
        for event in events
        if event["responseStatus"]["code"] == 403
        and not (_settling(world, event["requestReceivedTimestamp"]) and _asked(event) in allowed)
    ]


def test_no_request_of_a_lorapool_process_was_forbidden(world: World) -> None:
    accounts = f"system:serviceaccount:{world.namespace}:"
    events = [json.loads(line) for line in Path(world.summary["audit_log"]).read_text().splitlines()]
    ours = [e for e in events if e["stage"] == "ResponseComplete" and e["user"]["username"].startswith(accounts)]
    seen = {event["user"]["username"] for event in ours}
    assert len(seen) >= 2, f"operator and gateway must both have spoken, seen {seen}"
    assert forbidden(world, ours) == []


def test_no_pod_was_refused_or_warned_about(world: World) -> None:
    namespace = world.get("namespace", world.namespace)["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    events = world.get("events")["items"]
    assert [e["message"] for e in events if "violates PodSecurity" in e.get("message", "")] == []


def refusals(world: World, log: str) -> list[str]:
    """Lines of a pod's log that tell of a refusal, but for those of the moment after a restart (judged above)."""
    return [line for line in log.splitlines() if REFUSED.search(_untimed(line)) and not _excused(world, line)]


def _untimed(line: str) -> str:
    return re.sub(r'"time": "[^"]*"', "", line)


def _excused(world: World, line: str) -> bool:
    time = re.search(r'"time": "([^"]*)"', line)
    return time is not None and _settling(world, time[1])


def test_no_log_holds_a_forbidden_answer_or_the_key(world: World) -> None:
    for pod in world.get("pods")["items"]:
        log = world.kubectl("logs", pod["metadata"]["name"], "--all-containers", check=False)
        assert refusals(world, log) == []
        assert world.summary["api_key"] not in log

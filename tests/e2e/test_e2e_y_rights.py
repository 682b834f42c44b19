"""Runs after the other tests: no process needed more than the chart's RBAC in a restricted namespace."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from e2e_world import World

SETTLING_S = 20.0
"""A restarted API server has not loaded the roles yet and denies for a moment what it allows later."""


REFUSED = re.compile(r"forbidden|(?:status|code|reason|http/[\d.]+)\W{1,4}403\b|\(403\)|\" 403\b", re.IGNORECASE)
"""A refusal in words or as an HTTP status; a 403 that is a duration, a count or an address is not one."""


def _settling(world: World, timestamp: str) -> bool:
    at_unix_s = datetime.fromisoformat(timestamp).timestamp()
    return any(0 <= at_unix_s - start < SETTLING_S for start in world.starts_unix_s)


def _asked(event: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Subject, verb and resource: what one RBAC rule allows or denies."""
    ref = event.get("objectRef", {})
    kind = (ref.get("apiGroup", ""), ref.get("resource", ""), ref.get("subresource", ""))
    return (event["user"]["username"], event["verb"], *kind)


def forbidden(world: World, events: list[dict[str, Any]]) -> list[str]:
    """Every 403, except those right after a restart for a permission that was granted at another time."""
    allowed = {_asked(event) for event in events if event["responseStatus"]["code"] != 403}  # of a missing kind: 404
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
    """Lines of a pod's log that report a refusal, without those right after a restart (checked above)."""
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

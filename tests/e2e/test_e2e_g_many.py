"""Two hundred adapters applied at once: all checked, one status write each, all listed."""

import time
from datetime import UTC, datetime

from e2e_world import World, copies_of_routing

COUNT = 200
LABEL = "e2e"


def test_two_hundred_adapters_at_once(world: World) -> None:
    names = [f"many-{number:03}" for number in range(COUNT)]
    manifests = copies_of_routing(world, names, labels={LABEL: "many"})
    began, started = datetime.now(UTC).isoformat(), time.monotonic()
    try:
        world.apply(*manifests)
        applied = time.monotonic()

        def checked() -> object:
            items = [i for i in world.get("lora")["items"] if i["metadata"]["name"].startswith("many-")]
            ready = sum(
                any(c["type"] == "Ready" and c["status"] == "True" for c in i.get("status", {}).get("conditions", []))
                for i in items
            )
            return ready == COUNT or f"{ready} of {COUNT} ready"

        world.wait("every check", checked, timeout_s=120, every_s=1)
        settled = time.monotonic()
        with world.client() as client:
            world.wait(
                "the list of the gateway",
                lambda: {world.model(name) for name in names} <= {model.id for model in client.models.list()},
                timeout_s=30,
            )
        listed = time.monotonic()
        writes = _status_writes(world, names, began)
        print(
            f"{COUNT} adapters: applied in {applied - started:.1f} s, checked {settled - applied:.1f} s later, "
            f"listed {listed - settled:.1f} s after that; most status writes of one adapter: {max(writes.values())}"
        )
        assert set(writes.values()) == {1}
    finally:
        # one request: kubectl would get and delete the objects one by one
        path = f"/apis/lorapool.dev/v1alpha1/namespaces/{world.namespace}/loraadapters"
        world.kubectl("delete", "--raw", f"{path}?labelSelector={LABEL}%3Dmany")
        world.wait("their end", lambda: _left(world) == 0 or f"{_left(world)} left", timeout_s=60, every_s=1)


def _left(world: World) -> int:
    return sum(item["metadata"]["name"].startswith("many-") for item in world.get("lora")["items"])


def _status_writes(world: World, names: list[str], began: str) -> dict[str, int]:
    """Status writes of each adapter since then, from the API server's audit log."""
    import json
    from pathlib import Path

    count = dict.fromkeys(names, 0)
    for line in Path(world.summary["audit_log"]).read_text().splitlines():
        event = json.loads(line)
        ref = event.get("objectRef", {})
        if (
            ref.get("resource") == "loraadapters"
            and ref.get("subresource") == "status"
            and ref.get("name") in count
            and event["verb"] in ("patch", "update")
            and event["stage"] == "ResponseComplete"
            and event["requestReceivedTimestamp"] >= began
        ):
            count[ref["name"]] += 1
    return count

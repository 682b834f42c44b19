"""With operator and API server stopped, loaded adapters keep answering and an unloaded adapter still loads."""

import contextlib
from collections.abc import Iterator

from e2e_world import World


@contextlib.contextmanager
def _stopped_control_plane(world: World) -> Iterator[None]:
    world.kubectl("scale", "deploy/lorapool-operator", "--replicas=0")
    world.wait(
        "the operator's end",
        lambda: not world.get("pods", "-l", "app.kubernetes.io/component=operator")["items"] or "pods",
        timeout_s=60,
    )
    world.cluster("stop", "kube-apiserver")
    try:
        yield
    finally:
        world.cluster("start", "kube-apiserver")
        world.wait(
            "the API server", lambda: world.kubectl("get", "--raw", "/readyz", check=False) == "ok", timeout_s=60
        )
        world.kubectl("scale", "deploy/lorapool-operator", "--replicas=1")
        world.kubectl("rollout", "status", "deploy/lorapool-operator", "--timeout=120s", timeout_s=130)


def test_serving_goes_on_without_operator_and_api_server(world: World) -> None:
    world.patch("lora", "entities", {"idleAfter": "5s"})
    world.chat("entities")
    for task in ("routing", "sentiment"):
        world.chat(task)
    world.wait("entities unloaded", lambda: world.condition("lora", "entities", "Loaded")[1] == "Parked", timeout_s=60)
    with _stopped_control_plane(world):
        for _ in range(5):
            for task in ("routing", "sentiment", "entities"):
                assert world.chat(task) == (world.answer(task), world.header(task))
    world.patch("lora", "entities", {"idleAfter": "2m"})
    assert world.chat("entities") == (world.answer("entities"), world.header("entities"))

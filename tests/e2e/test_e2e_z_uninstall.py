"""`helm test`, then `helm uninstall`: the objects remain and can be deleted (upgrades: tests/chart)."""

from e2e_world import BASE, World


def test_the_release_passes_its_own_test_and_an_uninstall_keeps_the_objects(world: World) -> None:
    world.helm("test", "lorapool", "--timeout", "3m")
    world.helm("uninstall", "lorapool", "--wait", "--timeout", "3m")
    assert len(world.get("lora")["items"]) >= 5
    assert world.get("bm", BASE)["metadata"]["name"] == BASE
    world.kubectl("delete", "lora", "--all", "--timeout=30s", timeout_s=40)
    world.kubectl("delete", "bm", "--all", "--timeout=30s", timeout_s=40)
    world.wait("the runtime's end", lambda: not world.runtime_pods() or "pods", timeout_s=120)

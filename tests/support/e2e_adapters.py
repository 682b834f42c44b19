"""Further adapters for the cluster tests: copies of a real fine-tune under other names."""

from collections.abc import Iterable, Mapping
from typing import Any

from e2e_world import World


def copy_manifest(world: World, name: str, task: str = "routing") -> dict[str, Any]:
    """A LoraAdapter with another name and the source of a demo fine-tune."""
    return copy_manifests(world, [name], task)[0]


def copy_manifests(
    world: World, names: Iterable[str], task: str = "routing", *, labels: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Copies with these labels."""
    source = world.get("lora", task)["spec"]["source"]
    return [
        {
            "apiVersion": "lorapool.dev/v1alpha1",
            "kind": "LoraAdapter",
            "metadata": {"name": name, "namespace": world.namespace, "labels": dict(labels or {})},
            "spec": {"baseModelRef": {"name": "smollm2"}, "source": source},
        }
        for name in names
    ]


def copy_of_routing(world: World, name: str) -> None:
    """Applies a copy of the routing fine-tune."""
    world.apply(copy_manifest(world, name))

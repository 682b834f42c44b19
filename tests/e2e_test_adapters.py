"""Further adapters for the cluster tests: copies of a real fine-tune under other names."""

from e2e_world import World


def copy_manifest(world: World, name: str, task: str = "routing") -> dict[str, object]:
    """A LoraAdapter with another name and the source of a demo fine-tune."""
    source = world.get("lora", task)["spec"]["source"]
    return {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "LoraAdapter",
        "metadata": {"name": name, "namespace": world.namespace},
        "spec": {"baseModelRef": {"name": "smollm2"}, "source": source},
    }


def copy_of_routing(world: World, name: str) -> None:
    """Applies such a copy."""
    world.apply(copy_manifest(world, name))

"""Aliases and served names are unique among the models of a base's owner: first come, first served."""

from __future__ import annotations

from typing import Any

from lorapool_operator.decisions.blocker import blocker_of
from lorapool_operator.decisions.model_names import granted_name, name_conflict
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, ClusterCache
from lorapool_operator.world.intake import Intake

OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"


class Here:
    """The base `team/tiny`, which admits adapters of the namespace `guest`."""

    def __init__(self) -> None:
        self.cache, self.version = ClusterCache(), 0
        self.due: list[str] = []
        self.intake = Intake(self.cache, lambda key, delay_s: self.due.append(str(key)), counts_interval_s=1.0)
        self.base("tiny", access={"namespaces": ["guest"]})

    def base(self, name: str, namespace: str = "team", *, has: str | None = None, **spec: Any) -> BaseObject:
        raw = self._raw(name, namespace, OLD, {"source": {"uri": "hf://org/b"}, **spec}, {"servedName": has})
        self.intake.base(raw)
        found = self.cache.bases.get(namespace, name)
        assert found is not None
        return found

    def adapter(
        self, name: str, namespace: str = "team", *, created: str = OLD, has: str | None = None, **spec: Any
    ) -> AdapterObject:
        reference = {"baseModelRef": {"name": "tiny", "namespace": "team"}, "source": {"uri": "hf://org/a"}}
        raw = self._raw(name, namespace, created, {**reference, **spec}, {"alias": has})
        self.intake.adapter(raw)
        found = self.cache.adapters.get(namespace, name)
        assert found is not None
        return found

    def delete(self, item: AdapterObject) -> None:
        self.intake.adapter(self._raw(item.meta.name, item.meta.namespace, OLD, {}, {}), deleted=True)

    def has(self, item: BaseObject | AdapterObject) -> str | None:
        return granted_name(item, self.cache.name_holder(item))

    def _raw(self, name: str, namespace: str, created: str, spec: Any, status: Any) -> dict[str, Any]:
        self.version += 1
        meta = {"namespace": namespace, "name": name, "uid": f"{namespace}-{name}", "generation": 1}
        meta |= {"resourceVersion": str(self.version), "creationTimestamp": created}
        return {"metadata": meta, "spec": spec, "status": {key: value for key, value in status.items() if value}}


def test_a_free_name_goes_to_the_oldest_claimant_and_to_the_next_when_that_is_deleted() -> None:
    here = Here()
    young, old = here.adapter("young", created=NEW, alias="fast"), here.adapter("old", alias="fast")
    assert (here.has(young), here.has(old)) == (None, "fast")
    here.due.clear()
    here.delete(old)
    assert "team/young" in here.due
    assert here.has(young) == "fast"


def test_an_older_object_does_not_take_a_name_that_another_has() -> None:
    here = Here()
    holder = here.adapter("holder", created=NEW, alias="fast", has="fast")
    late = here.adapter("late", "guest", created=OLD, alias="fast")
    named = here.adapter("fast", "guest", created=OLD)
    assert (here.has(holder), here.has(late)) == ("fast", None)
    assert here.cache.name_holder(late) == holder.key
    assert here.has(named) is None


def test_the_name_of_an_object_and_a_served_name_are_not_free() -> None:
    here = Here()
    here.base("big", servedName="gpt", has="gpt")
    here.adapter("support", "guest")
    assert here.has(here.adapter("a", alias="gpt")) is None
    assert here.has(here.adapter("b", alias="support")) is None
    assert here.has(here.adapter("c", alias="tiny")) is None


def test_a_name_is_unique_for_one_owner_of_bases_only_and_no_stranger_takes_part() -> None:
    here = Here()
    here.base("tiny", "elsewhere")
    other = here.adapter("x", "elsewhere", baseModelRef={"name": "tiny"}, alias="fast", has="fast")
    here.adapter("stranger", "stranger", alias="fast", has="fast")  # team/tiny does not admit it
    assert here.has(here.adapter("mine", created=NEW, alias="fast")) == "fast"
    assert here.has(other) == "fast"


def test_a_conflict_names_an_object_of_the_own_namespace_and_no_other() -> None:
    here = Here()
    here.adapter("a", "team", alias="fast", has="fast")
    for namespace, shown in (("team", True), ("guest", False)):
        item = here.adapter("b", namespace, created=NEW, alias="fast")
        conflict = name_conflict(item, here.cache.name_holder(item))
        assert conflict is not None
        assert conflict[:2] == ("True", "AliasTaken")
        assert ("team/a" in conflict[2]) == shown


def test_a_name_with_a_slash_is_never_granted() -> None:
    here = Here()
    item = here.adapter("a", alias="team/x")
    conflict = name_conflict(item, here.cache.name_holder(item))
    assert conflict is not None
    assert conflict[1] == "NameReserved"
    assert here.has(item) is None


def test_a_foreign_base_that_does_not_exist_blocks_an_adapter_in_the_words_of_one_that_does_not_admit_it() -> None:
    here = Here()
    secret = here.base("secret", "finance")
    probe = here.adapter("probe", "guest", baseModelRef={"name": "secret", "namespace": "finance"})
    assert blocker_of(probe, secret) == blocker_of(probe, None) == blocker_of(probe, None, unreadable=True)
    assert blocker_of(probe, None) is not None

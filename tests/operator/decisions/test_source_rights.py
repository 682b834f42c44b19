"""Plans by the rules for sources: what a guest may not read is neither inspected nor served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import base_world
import pytest
from adapter_world import adapter, base, condition, good, inspected, meta, plan, replica, report, settled

from lorapool_api.basemodel import Access
from lorapool_artifacts.policy import Rights, SourcePolicy, SourceRules
from lorapool_operator.world.cluster_cache import AdapterObject
from lorapool_operator.world.observed import InspectionResult, ObservedAdapter, adapter_fingerprint

BASE = base(access={"namespaces": ["guest"]})


def rules(**grants: list[str]) -> SourceRules:
    sources = [{"namespace": name, "prefixes": prefixes} for name, prefixes in grants.items()]
    access = Access.model_validate({"namespaces": ["guest"], "sources": sources})
    return SourceRules.of(BASE.meta.namespace, access, SourcePolicy())


def guest(uri: str, **changes: Any) -> AdapterObject:
    return replace(adapter(source={"uri": uri}, **changes), meta=meta("a", "a-uid", namespace="guest"))


def own(of: AdapterObject) -> InspectionResult:
    """A result of an inspection with the guest's own rights."""
    return replace(inspected(good(), of, BASE), fingerprint=adapter_fingerprint(of, BASE, Rights.OWN))


def test_a_guests_adapter_on_the_owners_volume_is_refused_without_a_look_at_the_volume() -> None:
    made = plan(ObservedAdapter(guest("pvc://models/team-a/secret"), BASE, (replica(),), source_rules=rules()))
    assert made.inspect is None
    assert condition(made, "Ready") == ("False", "SourceNotPermitted")
    assert condition(made, "Stalled") == ("True", "SourceNotPermitted")
    assert made.status is not None
    assert made.status.digest is None


def test_a_granted_folder_is_inspected_by_a_runtime_as_before() -> None:
    one = guest("pvc://models/guest/tune")
    made = plan(ObservedAdapter(one, BASE, (replica(),), source_rules=rules(guest=["pvc://models/guest/"])))
    assert made.inspect is not None
    assert made.inspect.rights is Rights.SHARED


def test_a_guests_source_is_inspected_with_its_own_rights_and_the_owners_with_the_shared_ones() -> None:
    asked = plan(ObservedAdapter(guest("hf://acme/private"), BASE, source_rules=rules())).inspect
    assert asked is not None
    assert asked.rights is Rights.OWN
    owners = plan(ObservedAdapter(adapter(), BASE, source_rules=rules())).inspect
    assert owners is not None
    assert owners.rights is Rights.SHARED


def test_what_was_found_with_shared_rights_is_not_served_to_a_guest_until_it_is_found_with_its_own() -> None:
    """As after the upgrade to a version with these rules."""
    one = settled(guest("hf://acme/private"), BASE)
    holder = replica(report(of=good().digest))
    made = plan(ObservedAdapter(one, BASE, (holder,), source_rules=rules()), now=base_world.NOW)
    assert made.inspect is not None
    assert made.inspect.rights is Rights.OWN
    assert made.registers == ()
    found = plan(ObservedAdapter(one, BASE, (holder,), inspection=own(one), source_rules=rules()))
    assert condition(found, "Ready")[0] == "True"


def test_a_grant_that_is_taken_back_ends_the_serving_and_one_that_is_given_starts_an_inspection() -> None:
    one, granted = guest("pvc://models/guest/tune"), rules(guest=["pvc://models/guest/"])
    holder = replica(report(of=good().digest))
    serving = settled(one, BASE)
    taken = plan(ObservedAdapter(serving, BASE, (holder,), source_rules=rules()))
    assert condition(taken, "Ready") == ("False", "SourceNotPermitted")
    assert [item.adapter.digest for item in taken.unregisters] == [good().digest]
    assert taken.status is not None
    given = plan(ObservedAdapter(replace(serving, status=taken.status), BASE, (holder,), source_rules=granted))
    assert given.inspect is not None


def test_a_changed_source_that_is_not_permitted_leaves_the_old_files_serving() -> None:
    one = guest("hf://acme/public")
    status = plan(ObservedAdapter(one, BASE, inspection=own(one), source_rules=rules())).status
    assert status is not None
    changed = replace(guest("pvc://models/team-a/secret"), status=status)
    made = plan(ObservedAdapter(changed, BASE, (replica(),), source_rules=rules()))
    assert condition(made, "Ready")[0] == "True"
    assert condition(made, "Progressing") == ("False", "RolloutFailed")
    assert made.status is not None
    assert made.status.source_uri == "hf://acme/public"


@pytest.mark.parametrize("credentials", ["Shared", "Own"])
def test_a_base_is_inspected_with_the_rights_of_its_namespace_or_not_at_all(credentials: str) -> None:
    entry = {"prefixes": ["hf://org/"], "credentials": credentials}
    made = SourceRules.of("team", Access(), SourcePolicy.model_validate({"namespaces": {"team": entry}}))
    asked = base_world.plan(base_world.world(inspection=None, source_rules=made)).inspect
    assert asked is not None
    assert asked.rights == credentials
    none = SourceRules.of("team", Access(), SourcePolicy.model_validate({"namespaces": {"team": {"prefixes": []}}}))
    refused = base_world.plan(base_world.world(inspection=None, source_rules=none))
    assert refused.inspect is None
    assert refused.children == ()
    assert base_world.condition(refused, "SourceResolved") == ("False", "SourceNotPermitted")

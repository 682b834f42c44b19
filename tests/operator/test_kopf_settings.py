"""The settings that the operator pins hold whatever kopf's defaults are, and no other setting is changed."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import kopf
import pytest

from lorapool_operator.handlers import NoMemories, pinned_settings

PINNED = {
    "watching.server_timeout": 300,
    "watching.client_timeout": 330,
    "watching.inactivity_timeout": 70,
    "watching.connect_timeout": 10,
    "watching.chunk_size": 500,
    "networking.request_timeout": 15,
    "networking.error_backoffs": (1, 1, 2, 3, 5, 8),
    "queueing.error_delays": (1, 1, 2, 3, 5, 8, 13, 21, 30),
    "queueing.idle_timeout": 0.05,
    "queueing.worker_limit": 100,
    "execution.default_backoff": 5,
    "scanning.disabled": True,
    "posting.enabled": False,
    "posting.level": logging.WARNING,
    "persistence.finalizer": "lorapool.dev/never-used",
    "process.ultimate_exiting_timeout": None,
    "background.cancellation_polling": 5,
    "peering.standalone": True,
}
OBJECTS = {"watching.label_selectors", "persistence.progress_storage", "persistence.diffbase_storage"}
NEW_IN_EACH = {"execution.executor"}


def flat(settings: kopf.OperatorSettings) -> dict[str, Any]:
    groups = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    return {
        f"{name}.{item.name}": getattr(group, item.name)
        for name, group in groups.items()
        for item in dataclasses.fields(group)
    }


def test_every_pinned_setting_has_its_value_whatever_kopfs_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    other = kopf.OperatorSettings()
    for name in PINNED:
        group, field = name.split(".")
        setattr(getattr(other, group), field, "another default")
    monkeypatch.setattr(kopf, "OperatorSettings", lambda: other)
    pinned = flat(pinned_settings())
    assert {name: pinned[name] for name in PINNED} == PINNED


def test_no_other_setting_differs_from_kopfs_default() -> None:
    default = flat(kopf.OperatorSettings())
    changed = {name for name, value in flat(pinned_settings()).items() if value != default[name]}
    assert changed - NEW_IN_EACH <= PINNED.keys() | OBJECTS


def test_kopf_watches_only_pods_and_their_owners_of_bases() -> None:
    selectors = pinned_settings().watching.label_selectors
    assert len(selectors) == 6
    assert selectors["jobs.batch"] == "lorapool.dev/trainer"
    groups = "leaderworkersets.leaderworkerset.x-k8s.io"
    ours = ("pods", "replicasets.apps", "deployments.apps", groups)
    assert {selectors[kind] for kind in ours} == {"lorapool.dev/base"}
    assert selectors["statefulsets.apps"] == "leaderworkerset.sigs.k8s.io/name"  # they have no label of ours


def test_kopf_neither_copies_an_object_nor_writes_to_it() -> None:
    persistence = pinned_settings().persistence
    body, patch = kopf.Body({"metadata": {}, "spec": {"a": 1}}), kopf.Patch()
    progress, base = persistence.progress_storage, persistence.diffbase_storage
    assert base.build(body=body) == {}  # kopf's own would copy the object
    assert base.fetch(body=body) is None
    base.store(body=body, patch=patch, essence=kopf.BodyEssence())
    progress.touch(body=body, patch=patch, value="now")
    progress.purge(key=kopf.HandlerId("h"), body=body, patch=patch)
    assert not patch


async def test_kopf_keeps_nothing_of_an_object_between_its_events() -> None:
    memories, body = NoMemories(), {"metadata": {"uid": "a"}}
    await memories.recall(body, noticed_by_listing=True)
    await memories.recall(body)
    assert list(memories.iter_all_memories()) == []

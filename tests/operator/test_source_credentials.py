"""Namespaces' own credentials: how the operator reads them, uses them and gives them to runtimes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import Any

import base_world
import pytest
from fakes_operator import FakeInspector

from lorapool_api.protocol import NamespaceCredentials
from lorapool_api.store_protocol import StoreGrant, grant_of
from lorapool_api.trust.runtime_tokens import MasterTokens, RuntimeTokens
from lorapool_artifacts.policy import Rights, SourcePolicy
from lorapool_operator.decisions.plan import InspectionJob
from lorapool_operator.effects import source_access
from lorapool_operator.effects.cluster import ClusterError, ObjectNotFoundError
from lorapool_operator.effects.inspections import InspectionTracker
from lorapool_operator.effects.runtime_calls import RuntimeGoneError
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeTracker
from lorapool_operator.effects.source_access import CredentialDelivery, SourceAccess, credentials_of
from lorapool_operator.effects.store_grants import StoreGrants
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, ClusterCache, Key, ObjectKind

SECRET = "lorapool-source-credentials"


def secret(*, label: str | None = "true", **data: str) -> dict[str, Any]:
    labels = {} if label is None else {"lorapool.dev/source-credentials": label}
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
    return {"metadata": {"labels": labels}, "data": encoded}


class Secrets:
    """The Secrets of a cluster, and which ones were asked for."""

    def __init__(self, **found: dict[str, Any]) -> None:
        self.found = {name.replace("_", "-"): item for name, item in found.items()}
        self.asked: list[tuple[str, str]] = []
        self.down = False

    async def read(self, namespace: str, name: str) -> Mapping[str, Any]:
        self.asked.append((namespace, name))
        if self.down:
            raise ClusterError("the API server is away")
        if namespace not in self.found:
            raise ObjectNotFoundError("404", 404)
        return self.found[namespace]


def test_a_secret_without_the_label_is_not_used_and_only_credentials_are_taken() -> None:
    assert credentials_of(secret(HF_TOKEN="a", HF_ENDPOINT="http://evil", other="b")) == {"HF_TOKEN": "a"}
    for label in (None, "false", ""):
        assert credentials_of(secret(label=label, HF_TOKEN="a")) == {}
    assert credentials_of({"metadata": {"labels": {"lorapool.dev/source-credentials": "true"}},
                           "data": {"HF_TOKEN": "/w=="}}) == {}  # fmt: skip


async def test_a_secret_is_read_by_its_name_only_and_kept_while_the_api_server_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(source_access.time, "monotonic", lambda: now[0])
    secrets = Secrets(team_b=secret(HF_TOKEN="b"), team_c=secret(HF_TOKEN="c"))
    policy = SourcePolicy.model_validate({"namespaces": {"team-c": {"credentialsSecret": "mine"}}})
    access = SourceAccess(policy, read=secrets.read, secret=SECRET)
    assert await access.credentials("team-b", Rights.SHARED) is None
    assert await access.credentials("team-b", Rights.OWN) == {"HF_TOKEN": "b"}
    assert await access.credentials("team-c", Rights.OWN) == {"HF_TOKEN": "c"}
    assert await access.credentials("team-d", Rights.OWN) == {}
    assert await access.credentials("team-b", Rights.OWN) == {"HF_TOKEN": "b"}
    assert secrets.asked == [("team-b", SECRET), ("team-c", "mine"), ("team-d", SECRET)]
    now[0], secrets.down = source_access.REREAD_S, True
    assert await access.own("team-b") == {"HF_TOKEN": "b"}
    now[0], secrets.down, secrets.found = 2 * source_access.REREAD_S, False, {}
    assert await access.own("team-b") == {}


async def test_two_namespaces_that_name_one_source_are_inspected_each_with_its_own_rights() -> None:
    cache, done = ClusterCache(), asyncio.Queue[Key]()
    spec = {"metadata": {"namespace": "team", "name": "tiny", "uid": "b"}, "spec": {"source": {"uri": "hf://org/base"}}}
    cache.bases.put(BaseObject.parse(spec))
    runtimes = RuntimeTracker(
        cache, tokens=RuntimeTokens(["m" * 64]).of, settings=PollSettings(), changed=lambda *_, **__: None
    )
    secrets, inspector = Secrets(team_b=secret(HF_TOKEN="b")), FakeInspector(delay_s=0.01)
    tracker = InspectionTracker(
        cache,
        inspector,
        runtimes,
        concurrency=8,
        timeout_s=10.0,
        changed=lambda key, delay_s: None if delay_s else done.put_nowait(key),
        pending_status_s=5.0,
        access=SourceAccess(read=secrets.read, secret=SECRET),
    )
    for namespace, rights in (("team", Rights.SHARED), ("team-b", Rights.OWN), ("team-c", Rights.OWN)):
        key = Key(ObjectKind.ADAPTER, namespace, "a")
        tracker.start(InspectionJob(key, namespace, "f", 1, "hf://org/a", None, None, "b", 16, rights=rights))
    for _ in range(3):
        await done.get()
    await tracker.close()
    assert sorted(inspector.credentials, key=repr) == sorted([None, {"HF_TOKEN": "b"}, {}], key=repr)


class Runtimes:
    """Runtimes of one base, and what each received."""

    def __init__(self, *names: str) -> None:
        self.views = [base_world.runtime(name) for name in names]
        self.received: list[tuple[str, dict[str, dict[str, str]]]] = []
        self.gone = False

    def views_of(self, _: BaseObject) -> list[Any]:
        return self.views

    async def give_credentials(self, pod_uid: str, credentials: NamespaceCredentials) -> None:
        if self.gone:
            raise RuntimeGoneError("gone")
        self.received.append((pod_uid, credentials.namespaces))


def adapter_of(namespace: str) -> AdapterObject:
    return AdapterObject.parse(
        {
            "metadata": {"namespace": namespace, "name": "a", "uid": f"{namespace}-uid"},
            "spec": {"baseModelRef": {"name": "tiny", "namespace": "team"}, "source": {"uri": "hf://org/a"}},
        }
    )


async def test_runtimes_receive_the_credentials_of_guests_once_and_again_after_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(source_access.time, "monotonic", lambda: now[0])
    cache, runtimes = ClusterCache(), Runtimes("one")
    cache.bases.put(base_world.base(access={"namespaces": ["team-b"]}))
    secrets = Secrets(team_b=secret(HF_TOKEN="b"), team=secret(HF_TOKEN="not needed"))
    delivery = CredentialDelivery(cache, runtimes, SourceAccess(read=secrets.read, secret=SECRET))  # type: ignore[arg-type]  # a fake
    cache.put_adapter(adapter_of("team"))
    assert not await delivery.run_once()
    assert runtimes.received == []
    cache.put_adapter(adapter_of("team-b"))
    runtimes.gone = True
    await delivery.run_once()
    runtimes.gone = False
    assert not await delivery.run_once()
    await delivery.run_once()
    assert runtimes.received == [("one-uid", {"team-b": {"HF_TOKEN": "b"}})]
    runtimes.views.append(base_world.runtime("two"))
    await delivery.run_once()
    assert [uid for uid, _ in runtimes.received] == ["one-uid", "two-uid"]
    now[0], secrets.found["team-b"] = source_access.REREAD_S, secret(HF_TOKEN="new")
    assert await delivery.run_once()
    assert runtimes.received[2:] == [(uid, {"team-b": {"HF_TOKEN": "new"}}) for uid in ("one-uid", "two-uid")]


async def test_every_namespace_that_uses_a_base_receives_access_to_its_own_objects_of_the_store() -> None:
    cache, runtimes, secrets = (
        ClusterCache(),
        Runtimes("one"),
        Secrets(team_b=secret(HF_TOKEN="b", LORAPOOL_STORE_URL="x")),
    )
    cache.bases.put(base_world.base(access={"namespaces": ["team-b"]}))
    grants = StoreGrants("http://store:8000", MasterTokens(["s" * 64]))
    access = SourceAccess(read=secrets.read, secret=SECRET, store=grants.of_namespace)
    delivery = CredentialDelivery(cache, runtimes, access)  # type: ignore[arg-type]  # a fake
    cache.put_adapter(adapter_of("team"))
    cache.put_adapter(adapter_of("team-b"))
    await delivery.run_once()
    (_, received), *more = runtimes.received
    assert more == []
    assert {name: sorted(given) for name, given in received.items()} == {
        "team": ["LORAPOOL_STORE_CA", "LORAPOOL_STORE_TOKEN", "LORAPOOL_STORE_URL"],
        "team-b": ["HF_TOKEN", "LORAPOOL_STORE_CA", "LORAPOOL_STORE_TOKEN", "LORAPOOL_STORE_URL"],
    }
    for name, given in received.items():
        assert given["LORAPOOL_STORE_URL"] == "http://store:8000"
        assert grant_of(["s" * 64], given["LORAPOOL_STORE_TOKEN"], 0.0) == StoreGrant(read=(f"{name}/",))
    await delivery.run_once()
    assert len(runtimes.received) == 1


def test_credentials_are_in_no_repr() -> None:
    assert "hunter2" not in repr(NamespaceCredentials(namespaces={"team-b": {"HF_TOKEN": "hunter2"}}))

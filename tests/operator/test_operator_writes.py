"""A write that was decided for one object never affects its successor of the same name, or a newer version."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from operator_world import Api

from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_operator.access import load_configuration, make_client
from lorapool_operator.effects.cluster import Cluster, ObjectConflictError
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject

pytestmark = pytest.mark.apiserver


@pytest.fixture
async def cluster(api: Api) -> AsyncIterator[Cluster]:
    client = make_client(await load_configuration(api.server.kubeconfig))
    yield Cluster(client, timeout_s=15.0, identity="test")
    await client.close()


async def test_a_delete_spares_the_successor_of_the_same_name(api: Api, cluster: Cluster) -> None:
    service = {"metadata": {"name": "tiny-runtime"}, "spec": {"clusterIP": "None"}}
    old = await api.create("services", service)
    await api.delete("services", "tiny-runtime")
    new = await api.create("services", service)
    with pytest.raises(ObjectConflictError):
        await cluster.delete("Service", api.namespace, "tiny-runtime", uid=old["metadata"]["uid"])
    assert (await api.get("services", "tiny-runtime"))["metadata"]["uid"] == new["metadata"]["uid"]
    await cluster.delete("Service", api.namespace, "tiny-runtime", uid=new["metadata"]["uid"])
    assert await api.find("services", "tiny-runtime") is None
    await cluster.delete("Service", api.namespace, "tiny-runtime", uid=new["metadata"]["uid"])  # gone: no error


async def test_an_adapters_status_does_not_reach_the_successor_of_the_same_name(api: Api, cluster: Cluster) -> None:
    old = AdapterObject.parse(await api.adapter("a"))
    await api.delete("loraadapters", "a")
    await api.adapter("a")
    status = LoraAdapterStatus(state="Parked").dump()
    with pytest.raises(ObjectConflictError):
        await cluster.patch_status(old, status)
    new = await api.get("loraadapters", "a")
    assert "status" not in new
    written = await cluster.patch_status(AdapterObject.parse(new), status)
    assert written["status"]["state"] == "Parked"


async def test_a_bases_status_does_not_reach_the_successor_of_the_same_name(api: Api, cluster: Cluster) -> None:
    old = BaseObject.parse(await api.base())
    await api.delete("basemodels", "tiny")
    await api.base()
    with pytest.raises(ObjectConflictError):
        await cluster.patch_status(old, {"state": "Ready"})
    assert "status" not in await api.get("basemodels", "tiny")


async def test_a_scale_down_does_not_revert_a_wake_up_that_came_first(api: Api, cluster: Cluster) -> None:
    decided_for = BaseObject.parse(await api.base(replicas=1, scaling={"maxReplicas": 2}))
    await api.patch("basemodels", "tiny", {"spec": {"replicas": 2}}, sub="scale")
    with pytest.raises(ObjectConflictError):
        await cluster.scale(decided_for, 0)
    now = await api.get("basemodels", "tiny")
    assert now["spec"]["replicas"] == 2
    await cluster.scale(BaseObject.parse(now), 0)
    assert (await api.get("basemodels", "tiny"))["spec"]["replicas"] == 0


async def test_a_scale_does_not_reach_the_successor_of_the_same_name(api: Api, cluster: Cluster) -> None:
    old = BaseObject.parse(await api.base(replicas=1))
    await api.delete("basemodels", "tiny")
    await api.base(replicas=1)
    with pytest.raises(ObjectConflictError):
        await cluster.scale(old, 0)
    assert (await api.get("basemodels", "tiny"))["spec"]["replicas"] == 1

"""A write that was decided for one object never affects its successor of the same name, or a newer version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from authority_kit import authority
from operator_world import Api

from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_operator.access import load_configuration, make_client
from lorapool_operator.decisions.runtime_tls import TLS_SECRET, tls_entries
from lorapool_operator.effects.authority import Authority
from lorapool_operator.effects.certificates import Certificates
from lorapool_operator.effects.cluster import Cluster, ForeignObjectError, ObjectConflictError
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, ClusterCache

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


async def test_the_certificates_of_a_namespace_are_kept_in_one_secret_as_its_bases_come_and_go(
    api: Api, cluster: Cluster, tmp_path: Path
) -> None:
    authority(tmp_path)
    cache = ClusterCache()
    made = Certificates(cluster, cache, Authority(tmp_path))
    one, two, three = [BaseObject.parse(await api.base(name)) for name in ("one", "two", "three")]
    for base in (one, two):
        cache.bases.put(base)
        await made.ensure(base)
    first = await api.get("secrets", TLS_SECRET)
    assert set(first["data"]) == {*tls_entries(one.meta.uid), *tls_entries(two.meta.uid)}
    assert {owner["uid"] for owner in first["metadata"]["ownerReferences"]} == {one.meta.uid, two.meta.uid}
    cache.bases.drop(one.meta.namespace, one.meta.name)
    cache.bases.put(three)
    await made.ensure(three)
    second = await api.get("secrets", TLS_SECRET)
    assert set(second["data"]) == {*tls_entries(two.meta.uid), *tls_entries(three.meta.uid)}
    assert {owner["uid"] for owner in second["metadata"]["ownerReferences"]} == {two.meta.uid, three.meta.uid}
    assert all(second["data"][name] == first["data"][name] for name in tls_entries(two.meta.uid))
    assert second["metadata"]["uid"] == first["metadata"]["uid"]


async def test_a_secret_of_others_is_left_as_it_is(api: Api, cluster: Cluster, tmp_path: Path) -> None:
    authority(tmp_path)
    await api.create("secrets", {"metadata": {"name": TLS_SECRET}, "stringData": {"theirs": "x"}})
    base, cache = BaseObject.parse(await api.base()), ClusterCache()
    cache.bases.put(base)
    with pytest.raises(ForeignObjectError):
        await Certificates(cluster, cache, Authority(tmp_path)).ensure(base)
    assert set((await api.get("secrets", TLS_SECRET))["data"]) == {"theirs"}


async def test_a_secret_of_deleted_bases_alone_makes_room_for_a_new_one(
    api: Api, cluster: Cluster, tmp_path: Path
) -> None:
    authority(tmp_path)
    old, cache = BaseObject.parse(await api.base()), ClusterCache()
    cache.bases.put(old)
    await Certificates(cluster, cache, Authority(tmp_path)).ensure(old)
    await api.delete("basemodels", "tiny")
    new, cache = BaseObject.parse(await api.base()), ClusterCache()
    cache.bases.put(new)
    certificates = Certificates(cluster, cache, Authority(tmp_path))
    with pytest.raises(ObjectConflictError):  # it is deleted, as the API server's own collector does
        await certificates.ensure(new)
    await certificates.ensure(new)
    assert set((await api.get("secrets", TLS_SECRET))["data"]) == set(tls_entries(new.meta.uid))

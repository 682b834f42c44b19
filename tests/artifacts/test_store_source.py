"""`store://` sources against a store's own process: an adapter is inspected and fetched with a namespace's token."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import artifact_zoo as zoo
import pytest
from authority_kit import authority, serve_with
from store_kit import MASTER, StoreProcess, running_store

from lorapool_api.common import FailureReason
from lorapool_api.store_protocol import StoreAccess, StoreGrant, mint
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, resolve
from lorapool_artifacts.inspect import inspect_adapter
from lorapool_artifacts.settings import STORE_CA, STORE_TOKEN, STORE_URL, AdapterLimits, SourceSettings
from lorapool_artifacts.sources.store_client import StoreClient

LIMITS = AdapterLimits(max_rank=64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with running_store(tmp_path_factory.mktemp("store")) as made:
        yield made


def settings(store: StoreProcess, namespace: str = "team-a", ca: str = "") -> SourceSettings:
    token = mint(MASTER, StoreGrant(read=(f"{namespace}/",)))
    return SourceSettings().with_only({STORE_URL: store.url, STORE_TOKEN: token, STORE_CA: ca})


def push(store: StoreProcess, name: str, files: dict[str, bytes]) -> None:
    for file, data in files.items():
        assert store.call("PUT", f"{name}/{file}", data).status_code == 201


async def test_an_adapter_in_the_store_is_inspected_and_fetched(store: StoreProcess, tmp_path: Path) -> None:
    files = zoo.adapter_files()
    push(store, "team-a/adapters/one", files)
    found = await inspect_adapter("store://team-a/adapters/one", None, None, None, LIMITS, settings(store))
    resolved = await resolve("store://team-a/adapters/one", found.revision, settings=settings(store))
    folder = await fetch(resolved, tmp_path, found.digest)
    assert (folder / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    assert f"sha256:{folder.name}" == found.digest


async def test_a_token_of_another_namespace_opens_nothing(store: StoreProcess) -> None:
    push(store, "team-a/adapters/one", zoo.adapter_files())
    for uri in ("store://team-a/adapters/one", "store://team-a/adapters/none"):
        with pytest.raises(ArtifactError) as caught:
            await inspect_adapter(uri, None, None, None, LIMITS, settings(store, "team-b"))
        assert caught.value.reason is FailureReason.UNAUTHORIZED


async def test_a_folder_without_objects_is_not_found(store: StoreProcess) -> None:
    with pytest.raises(ArtifactError) as caught:
        await inspect_adapter("store://team-a/adapters/none", None, None, None, LIMITS, settings(store))
    assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


async def test_without_a_store_the_source_is_unavailable_and_says_what_to_enable() -> None:
    with pytest.raises(ArtifactError, match=r"store\.enabled") as caught:
        await inspect_adapter("store://team-a/adapters/one", None, None, None, LIMITS, SourceSettings())
    assert caught.value.transient


async def test_files_that_are_replaced_while_they_are_read_are_read_again(store: StoreProcess, tmp_path: Path) -> None:
    push(store, "team-a/adapters/two", zoo.adapter_files())
    resolved = await resolve("store://team-a/adapters/two", settings=settings(store))
    push(store, "team-a/adapters/two", {"adapter_config.json": b"{}"})
    with pytest.raises(ArtifactError):
        await fetch(replace(resolved, limits=replace(resolved.limits, total_timeout_s=2.0)), tmp_path)
    assert zoo.names_in(tmp_path) == []


def test_a_client_writes_lists_reads_and_deletes(store: StoreProcess) -> None:
    token = mint(MASTER, StoreGrant(write=("team-a/jobs/7/",)))
    client = StoreClient(StoreAccess(url=store.url, token=token))
    stored = client.put("team-a", "jobs/7/a", io.BytesIO(b"12345"))
    client.put("team-a", "jobs/7/b/c", b"")
    assert (stored.size, client.head("team-a", "jobs/7/a").size) == (5, 5)
    assert b"".join(client.stream("team-a", "jobs/7/a", 1, 3)) == b"234"
    assert client.get("team-a", "jobs/7/a") == b"12345"
    assert [item.key for item in client.list("team-a", "jobs/7/")] == ["jobs/7/a", "jobs/7/b/c"]
    client.delete("team-a", "jobs/7/")
    assert client.list("team-a", "jobs/7/") == []
    with pytest.raises(ArtifactError) as caught:
        client.put("team-a", "jobs/8/a", b"1")
    assert caught.value.reason is FailureReason.UNAUTHORIZED
    client.close()


def test_only_the_releases_authority_and_the_stores_name_are_trusted(tmp_path: Path) -> None:
    ours, other = authority(tmp_path / "ours"), authority(tmp_path / "other")
    ca = (tmp_path / "ours" / "ca.crt").read_text()
    folder = serve_with(tmp_path / "tls", ours, "store")
    with running_store(tmp_path / "store", tls_dir=str(folder)) as store:
        access = StoreAccess(url=store.url, token=mint(MASTER, StoreGrant(read=("",))), ca=ca)

        def listed() -> list[str]:
            client = StoreClient(access)
            try:
                return [item.key for item in client.list("team-a")]
            finally:
                client.close()

        assert listed() == []
        for issuer, name in ((other, "store"), (ours, "some-base-uid")):
            serve_with(folder, issuer, name)
            with pytest.raises(ArtifactError) as caught:
                listed()
            assert caught.value.reason is FailureReason.SOURCE_UNAVAILABLE

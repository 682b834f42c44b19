"""s3:// against moto's server on loopback, through the real obstore."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import artifact_zoo as zoo
import obstore
import pytest
from artifact_hub import Fault, Hub
from obstore.store import S3Store

from lorapool_api.common import FailureReason, FileDigest, artifact_digest
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import inspect_adapter, inspect_base
from lorapool_artifacts.settings import AdapterLimits, FetchLimits, SourceSettings
from lorapool_artifacts.sources import open_source
from lorapool_artifacts.uri import parse_uri

moto_server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

LIMITS = AdapterLimits(max_rank=8, max_bytes=1_000_000)
KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> S3Store:
    with contextlib.closing(boto3.client("s3", endpoint_url=endpoint, **KEYS)) as client:
        client.create_bucket(Bucket="models")
    return S3Store(
        "models",
        config={"endpoint": endpoint, "access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"},
        client_options={"allow_http": True},
    )


@pytest.fixture
def s3(endpoint: str, bucket: S3Store) -> SourceSettings:
    env = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return SourceSettings.from_env(env)


def put(bucket: S3Store, prefix: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        obstore.put(bucket, f"{prefix}/{name}", data)


async def test_an_adapter_is_checked_hashed_and_fetched(bucket: S3Store, s3: SourceSettings, tmp_path: Path) -> None:
    files = zoo.adapter_files()
    put(bucket, "a/lora", {**files, "sub/adapter_model.safetensors": b"other"})
    seen = await inspect_adapter("s3://models/a/lora/", None, None, None, LIMITS, s3)
    assert seen.compatibility.ok, seen.compatibility.message
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert seen.digest == artifact_digest(
        FileDigest(name, len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in names
    )
    path = await fetch(await resolve("s3://models/a/lora", seen.revision, settings=s3), tmp_path, seen.digest)
    assert folder_digest(path) == seen.digest
    assert (path / names[1]).read_bytes() == files[names[1]]


async def test_changed_content_is_a_digest_mismatch_for_who_pinned_the_old(
    bucket: S3Store, s3: SourceSettings, tmp_path: Path
) -> None:
    put(bucket, "b", zoo.adapter_files())
    seen = await inspect_adapter("s3://models/b", None, None, None, LIMITS, s3)
    put(bucket, "b", zoo.adapter_files(lora_alpha=1))
    with pytest.raises(ArtifactError) as caught:
        await fetch(await resolve("s3://models/b", seen.revision, settings=s3), tmp_path, seen.digest)
    assert caught.value.reason is FailureReason.DIGEST_MISMATCH
    assert (await inspect_adapter("s3://models/b", None, None, None, LIMITS, s3)).revision != seen.revision


def test_an_object_that_changes_between_listing_and_reading_is_noticed(bucket: S3Store, s3: SourceSettings) -> None:
    put(bucket, "c", zoo.adapter_files())
    source = open_source(parse_uri("s3://models/c"), None, s3, Deadline(FetchLimits(), where="c"))
    put(bucket, "c", zoo.adapter_files(lora_alpha=2))
    with pytest.raises(ArtifactError, match="changed") as caught:
        list(source.stream("adapter_config.json"))
    assert caught.value.transient


@pytest.mark.parametrize("uri", ["s3://models/nowhere", "s3://no-such-bucket/x"])
async def test_what_is_not_there_is_not_found(s3: SourceSettings, uri: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        await resolve(uri, settings=s3)
    assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


async def test_a_prefix_with_adapters_in_folders_is_answered_with_their_names(
    bucket: S3Store, s3: SourceSettings
) -> None:
    put(bucket, "runs/checkpoint-500", zoo.adapter_files())
    put(bucket, "runs", {"training_args.bin": b"x"})
    with pytest.raises(ArtifactError, match="such as s3://models/runs/checkpoint-500"):
        await resolve("s3://models/runs", settings=s3)


async def test_a_bucket_has_no_revisions_by_name(s3: SourceSettings) -> None:
    with pytest.raises(ArtifactError) as caught:
        await resolve("s3://models/a/lora", "main", settings=s3)
    assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_base_of_s3_has_facts_and_a_digest(bucket: S3Store, s3: SourceSettings) -> None:
    put(bucket, "base", zoo.base_files())
    seen = await inspect_base("s3://models/base", None, s3)
    assert seen.files.shapes["model.layers.0.self_attn.k_proj.weight"] == (zoo.KV, zoo.HIDDEN)
    assert seen.digest is not None
    assert seen.files.names == {"base", "tiny/llama"}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, FailureReason.SOURCE_NOT_FOUND),
        (403, FailureReason.UNAUTHORIZED),
        (401, FailureReason.UNAUTHORIZED),
        (429, FailureReason.RATE_LIMITED),
        (500, FailureReason.SOURCE_UNAVAILABLE),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
async def test_each_status_of_the_store_has_its_reason(
    hub: Hub, status: int, reason: FailureReason, signed: bool
) -> None:
    hub.faults = [Fault("/models", status=status)]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"} if signed else {}
    with pytest.raises(ArtifactError) as caught:
        await resolve("s3://models/x", settings=SourceSettings.from_env({"AWS_ENDPOINT_URL": hub.url, **keys}))
    assert caught.value.reason is reason
    if reason is FailureReason.UNAUTHORIZED:
        assert "AWS_ACCESS_KEY_ID" in caught.value.message


async def test_a_store_that_hangs_is_given_up_after_the_idle_time(hub: Hub, quick: FetchLimits) -> None:
    hub.faults = [Fault("/models", delay_s=1.0)]
    settings = SourceSettings.from_env({"AWS_ENDPOINT_URL": hub.url})
    with pytest.raises(ArtifactError) as caught:
        await resolve("s3://models/x", None, "adapter", quick, settings)
    assert caught.value.reason is FailureReason.SOURCE_TIMEOUT


async def test_an_endpoint_at_a_metadata_address_is_refused() -> None:
    settings = SourceSettings.from_env({"AWS_ENDPOINT_URL": "http://169.254.169.254"})
    with pytest.raises(ArtifactError) as caught:
        await resolve("s3://models/x", settings=settings)
    assert caught.value.reason is FailureReason.INVALID_SOURCE

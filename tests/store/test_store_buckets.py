"""The store in front of an S3 bucket: the same API, and what is deleted is gone from the bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from store_kit import StoreProcess

BUCKET = "finetunes"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> Any:
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture
def store(bucket: Any, endpoint: str, tmp_path: Path) -> Iterator[StoreProcess]:
    settings = {
        "LORAPOOL_STORE_LOCATION": f"s3://{BUCKET}/data",
        "LORAPOOL_STORE_QUOTA_BYTES": "4096",
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    made = StoreProcess(tmp_path, settings).start()
    yield made
    made.stop()


def names(bucket: Any) -> list[str]:
    return [item["Key"] for item in bucket.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def test_objects_are_written_read_listed_and_deleted_in_the_bucket(store: StoreProcess, bucket: Any) -> None:
    content = bytes(range(256)) * 4
    assert store.call("PUT", "team-a/jobs/1/state", content).status_code == 201
    assert store.call("PUT", "team-a/jobs/2/state", b"other").status_code == 201
    assert store.call("PUT", "team-b/jobs/1/state", b"foreign").status_code == 201
    assert store.call("GET", "team-a/jobs/1/state").content == content
    part = store.call("GET", "team-a/jobs/1/state", Range="bytes=10-19")
    assert (part.status_code, part.content) == (206, content[10:20])
    assert store.keys("team-a", "jobs/1/") == ["jobs/1/state"]
    assert store.call("DELETE", "team-a/jobs/1/").status_code == 204
    assert store.call("GET", "team-a/jobs/1/state").status_code == 404
    kept = names(bucket)
    assert not [name for name in kept if "team-a" in name and "/jobs/1/" in name]
    assert len([name for name in kept if name.endswith("/state")]) == 2


def test_a_namespace_that_is_full_is_refused_with_507_and_nothing_is_written(store: StoreProcess, bucket: Any) -> None:
    assert store.call("PUT", "team-c/a", b"x" * 4000).status_code == 201
    assert store.call("PUT", "team-c/b", b"x" * 200).status_code == 507
    assert [name for name in names(bucket) if "team-c" in name and name.endswith("/b")] == []

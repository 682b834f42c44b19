"""The store in front of an S3 bucket: the same API, and what is deleted is gone from the bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bucket_kit import Bucket, running_bucket
from store_kit import StoreProcess


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with running_bucket() as made:
        yield made


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> Iterator[StoreProcess]:
    made = StoreProcess(tmp_path, {**bucket.settings(), "LORAPOOL_STORE_QUOTA_BYTES": "4096"}).start()
    yield made
    made.stop()


def test_objects_are_written_read_listed_and_deleted_in_the_bucket(store: StoreProcess, bucket: Bucket) -> None:
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
    kept = bucket.names()
    assert not [name for name in kept if "team-a" in name and "/jobs/1/" in name]
    assert len([name for name in kept if name.endswith("/state")]) == 2


def test_a_namespace_that_is_full_is_refused_with_507_and_nothing_is_written(
    store: StoreProcess, bucket: Bucket
) -> None:
    assert store.call("PUT", "team-c/a", b"x" * 4000).status_code == 201
    assert store.call("PUT", "team-c/b", b"x" * 200).status_code == 507
    assert [name for name in bucket.names() if "team-c" in name and name.endswith("/b")] == []

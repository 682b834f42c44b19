"""Data sets of FineTuneJobs are checked in a real store, and what a job wrote is deleted there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from store_kit import MASTER, StoreProcess
from tuning_plans import job

from lorapool_api.store_protocol import StoreGrant
from lorapool_api.trust.runtime_tokens import MasterTokens
from lorapool_api.tuning.states import JobFailure
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.sources.store_client import StoreClient
from lorapool_operator.effects.job_files import StoreFiles
from lorapool_operator.effects.store_grants import StoreGrants

LINE = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})
GOOD = "".join(f"{LINE}\n" for _ in range(12)).encode()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    process = StoreProcess(tmp_path_factory.mktemp("store")).start()
    yield process
    process.stop()


@pytest.fixture
def grants(store: StoreProcess) -> StoreGrants:
    return StoreGrants(store.url, MasterTokens((MASTER,)))


def put(grants: StoreGrants, namespace: str, key: str, content: bytes) -> None:
    client = StoreClient(grants.access(StoreGrant(write=("",))))
    client.put(namespace, key, content)
    client.close()


@pytest.mark.parametrize(
    ("content", "failure", "line", "named"),
    [
        (b"".join(GOOD.splitlines(keepends=True)[:9]), JobFailure.TOO_FEW_EXAMPLES, None, "9 examples"),
        (b"", JobFailure.TOO_FEW_EXAMPLES, None, "empty"),
        (GOOD + b"[1]\n", JobFailure.INVALID_DATASET, 13, "13"),
    ],
)
async def test_a_bad_file_is_found_with_its_line(
    grants: StoreGrants, content: bytes, failure: JobFailure, line: int | None, named: str
) -> None:
    put(grants, "team", "files/j", content)
    found = await StoreFiles(grants).check(job())
    assert (found.failure, found.line) == (failure, line)
    assert named in found.message


async def test_a_line_of_the_validation_file_is_not_taken_for_one_of_the_training_file(grants: StoreGrants) -> None:
    put(grants, "team", "files/j", GOOD)
    put(grants, "team", "files/held-out", GOOD + b"[1]\n")
    data = {"training": {"uri": "store://team/files/j"}, "validation": {"uri": "store://team/files/held-out"}}
    found = await StoreFiles(grants).check(job(data=data))
    assert (found.failure, found.line) == (JobFailure.INVALID_DATASET, 13)
    assert found.message.startswith("In the validation file: Line 13 ")


async def test_a_good_file_is_counted_and_its_digest_is_that_of_its_bytes(grants: StoreGrants) -> None:
    put(grants, "team", "files/j", GOOD)
    found = await StoreFiles(grants).check(job())
    assert (found.failure, found.examples) == (None, 12)
    assert found.digest == f"sha256:{hashlib.sha256(GOOD).hexdigest()}"


async def test_a_file_that_is_not_the_one_that_was_named_is_refused(grants: StoreGrants) -> None:
    put(grants, "team", "files/j", GOOD)
    data: dict[str, Any] = {"training": {"uri": "store://team/files/j", "digest": "sha256:" + "0" * 64}}
    found = await StoreFiles(grants).check(job(data={**data, "validationFraction": "0.1"}))
    assert found.failure is JobFailure.INVALID_DATASET


async def test_a_missing_file_is_final_and_a_missing_store_is_not(grants: StoreGrants) -> None:
    assert (await StoreFiles(grants).check(job("gone"))).failure is JobFailure.INVALID_DATASET
    away = StoreGrants("http://127.0.0.1:9", MasterTokens((MASTER,)))
    assert (await StoreFiles(away).check(job())).failure is JobFailure.SOURCE_UNAVAILABLE


async def test_a_trainer_reads_its_data_writes_its_folders_and_nothing_else(grants: StoreGrants) -> None:
    put(grants, "team", "files/j", GOOD)
    put(grants, "team", "files/other", GOOD)
    client = StoreClient(StoreFiles(grants).access(job(), None))
    assert client.get("team", "files/j") == GOOD
    client.put("team", "jobs/j-uid/report.json", b"{}")
    for attempt in (
        lambda: client.get("team", "files/other"),
        lambda: client.put("team", "files/j", b""),
        lambda: client.put("team", "jobs/other-uid/report.json", b""),
    ):
        with pytest.raises(ArtifactError):
            attempt()
    client.close()


async def test_deletion_deletes_the_work_and_keeps_a_result_that_is_served(
    grants: StoreGrants, store: StoreProcess
) -> None:
    put(grants, "team", "jobs/j-uid/checkpoints/1/state", b"x")
    put(grants, "team", "adapters/j-uid/adapter_config.json", b"{}")
    client = StoreClient(grants.access(StoreGrant(write=("",))))
    await StoreFiles(grants).delete(job().meta, keep_result=True)
    assert (client.list("team", "jobs/j-uid/"), len(client.list("team", "adapters/j-uid/"))) == ([], 1)
    await StoreFiles(grants).delete(job().meta, keep_result=False)
    assert client.list("team", "adapters/j-uid/") == []
    client.close()
    assert not [name for name in store.files() if "j-uid" in name]

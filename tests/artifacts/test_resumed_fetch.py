"""Downloads of base models into a cache that outlives the process and that several pods may share."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import artifact_zoo as zoo
import pytest
from artifact_hub import Fault, Hub

from lorapool_api.common import FailureReason
from lorapool_artifacts import fetch as fetch_module
from lorapool_artifacts import writer_folders
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import inspect_base
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_artifacts.writer_folders import DEAD_AFTER_S, FORGOTTEN_AFTER_S, partial_folder, remove_dead

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "WAIT_S", 0.02)
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.01)


async def fetched(root: Path, hf: SourceSettings, limits: FetchLimits | None = None) -> tuple[Path, list[int]]:
    """The folder, and the progress that was reported."""
    progress: list[int] = []
    resolved = await resolve("hf://acme/base", None, "base", limits, hf)
    return await fetch(resolved, root, resume=True, on_progress=progress.append), progress


def names(root: Path, pattern: str) -> list[Path]:
    return list(root.glob(pattern))


def another_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "another-pod")


def make_old(root: Path, seconds: float) -> None:
    for lock in root.glob(".*.lock"):
        os.utime(lock, (lock.stat().st_atime, lock.stat().st_mtime - seconds))


async def interrupted(root: Path, hub: Hub, hf: SourceSettings) -> None:
    """A download that ends after the first shard and 100 bytes of the second."""
    hub.repos["acme/base"] = zoo.sharded_base_files()
    hub.faults = [Fault(SHARDS[1], break_after=100, times=1), Fault(SHARDS[1], status=500)]
    with pytest.raises(ArtifactError):
        await fetched(root, hf)
    hub.faults.clear()
    hub.requests.clear()


async def test_an_interrupted_download_continues_in_the_next_process(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    await interrupted(tmp_path, hub, hf)
    path, progress = await fetched(tmp_path, hf)
    assert {name: (path / name).read_bytes() for name in SHARDS} == {
        name: hub.repos["acme/base"][name] for name in SHARDS
    }
    asked = [(url.rpartition("/")[2], headers.get("range")) for _, url, headers in hub.requests]
    assert folder_digest(path) == (await inspect_base("hf://acme/base", None, hf)).digest
    assert SHARDS[0] not in {name for name, _ in asked}
    assert (SHARDS[1], "bytes=100-") in asked
    assert progress[-1] == sum(file.stat().st_size for file in path.iterdir())
    assert progress == sorted(progress)
    assert sorted(name[:9] for name in zoo.names_in(tmp_path)) == sorted([".fetched-", path.name[:9]])


async def test_a_base_that_was_fetched_is_not_fetched_again_though_its_source_lists_no_hashes(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    hub.repos["acme/base"] = zoo.base_files()
    path, _ = await fetched(tmp_path, hf)
    hub.requests.clear()
    assert (await fetched(tmp_path, hf))[0] == path
    assert not any("/resolve/" in url for _, url, _ in hub.requests)


async def test_what_an_earlier_process_left_damaged_is_fetched_again(
    hub: Hub, hf: SourceSettings, tmp_path: Path
) -> None:
    await interrupted(tmp_path, hub, hf)
    [unfinished] = names(tmp_path, ".part-*/*.unfinished")
    unfinished.write_bytes(b"\0" * 100)
    path, _ = await fetched(tmp_path, hf)
    assert (path / SHARDS[1]).read_bytes() == hub.repos["acme/base"][SHARDS[1]]


async def test_a_second_pod_waits_for_the_first_and_fetches_nothing(
    hub: Hub, hf: SourceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["acme/base"] = zoo.base_files()
    hub.faults = [Fault("model.safetensors", delay_s=0.4)]
    first = asyncio.create_task(fetched(tmp_path, hf))
    while not names(tmp_path, ".part-*/config.json"):  # noqa: ASYNC110  another process has no event
        await asyncio.sleep(0.01)
    monkeypatch.setattr(fetch_module, "_downloads", fetch_module._Downloads())  # those of another process
    another_pod(monkeypatch)
    second, progress = await fetched(tmp_path, hf)
    assert second == (await first)[0]
    assert hub.bodies_sent_of("model.safetensors") == 1
    assert progress  # what the first has on disk


async def test_the_download_of_another_pod_is_taken_over_only_when_it_has_ended_for_long(
    hub: Hub, hf: SourceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the volume carries no locks from node to node, a lock that is free proves nothing."""
    await interrupted(tmp_path, hub, hf)
    another_pod(monkeypatch)
    with pytest.raises(ArtifactError) as caught:
        await fetched(tmp_path, hf, FetchLimits(total_timeout_s=0.3))
    assert caught.value.reason is FailureReason.SOURCE_TIMEOUT
    make_old(tmp_path, DEAD_AFTER_S + 5)
    path, _ = await fetched(tmp_path, hf)
    assert SHARDS[0] not in {url.rpartition("/")[2] for _, url, _ in hub.requests}
    assert path.is_dir()


def test_only_folders_of_dead_writers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = socket.gethostname()
    for name, host in (("ours", own), ("theirs", "another-pod"), ("old", "another-pod")):
        (tmp_path / f".tmp-{name}").mkdir()
        (tmp_path / f".tmp-{name}.lock").write_text(host)
    old = tmp_path / ".tmp-old.lock"
    os.utime(old, (0, old.stat().st_mtime - DEAD_AFTER_S - 5))
    with partial_folder(tmp_path, "key") as folder:
        (folder / "one").touch()
        assert remove_dead(tmp_path) == 2
        assert zoo.names_in(tmp_path) == sorted([".tmp-theirs", ".tmp-theirs.lock", folder.name, f"{folder.name}.lock"])
    assert remove_dead(tmp_path) == 0  # it can be continued
    make_old(tmp_path, FORGOTTEN_AFTER_S + 5)
    assert remove_dead(tmp_path) == 2
    assert zoo.names_in(tmp_path) == []


def test_a_writer_keeps_its_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_folders, "TOUCH_S", 0.01)
    with writer_folders.temporary_folder(tmp_path) as folder:
        lock = folder.with_name(f"{folder.name}.lock")
        os.utime(lock, (0, 0))
        while lock.stat().st_mtime == 0:
            os.sched_yield()
        assert not writer_folders.is_dead(lock)
    assert zoo.names_in(tmp_path) == []


async def test_a_base_larger_than_the_bound_is_refused_with_the_bound_that_was_set(hub: Hub) -> None:
    hub.repos["acme/base"] = zoo.base_files()
    small = SourceSettings.from_env({"HF_ENDPOINT": hub.url, "LORAPOOL_BASE_MAX_BYTES": "1000"})
    with pytest.raises(ArtifactError) as caught:
        await inspect_base("hf://acme/base", None, small)
    assert caught.value.reason is FailureReason.TOO_LARGE
    assert "raise the chart's artifacts.maxBaseBytes" in caught.value.message
    assert SourceSettings().base_max_bytes > 150e9
    assert SourceSettings().base_fetch_timeout_s > 150e9 / 10e6


async def test_a_source_slower_than_the_minimum_rate_is_given_up(hub: Hub, hf: SourceSettings, tmp_path: Path) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.faults = [Fault("adapter_model.safetensors", drip_s=0.02)]
    slow = FetchLimits(idle_timeout_s=0.3, total_timeout_s=60.0, min_bytes_per_s=100_000)
    with pytest.raises(ArtifactError, match="at least 100000 are required") as caught:
        await fetch(await resolve("hf://acme/lora", None, "adapter", slow, hf), tmp_path)
    assert caught.value.reason is FailureReason.SOURCE_TIMEOUT

"""The disk cache: pinned folders stay, the least recently used are evicted, leftovers are removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import artifact_zoo as zoo
import pytest
from artifact_hub import Hub
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.common import FailureReason
from lorapool_artifacts import fetch as fetch_module
from lorapool_artifacts.cache import CacheEntry, DiskCache, plan_eviction
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.settings import SourceSettings
from lorapool_artifacts.writer_folders import remove_dead


def put(cache: DiskCache, letter: str, size_bytes: int, used_at_s: int) -> str:
    folder = cache.root / (letter * 64)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * size_bytes)
    os.utime(folder, (used_at_s, used_at_s))
    return folder_digest(folder)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    made = DiskCache(tmp_path / "cache", high_bytes=10_000, low_bytes=6_000)
    made.start()
    return made


def test_the_least_recently_used_leaves_first_and_a_pinned_one_never(cache: DiskCache) -> None:
    a, b, c = (put(cache, letter, 3000, age) for letter, age in (("a", 1), ("b", 2), ("c", 3)))
    cache.touch(b)
    with cache.pinned(a), cache.pinned(a):
        assert cache.evict(3000) == 6000
        assert (cache.get(a) is not None, cache.get(b), cache.get(c)) == (True, None, None)
        assert cache.evict(0) == 0
    assert cache.evict(0) == 3000
    assert list(cache.root.iterdir()) == []


async def test_room_is_made_before_a_fetch(cache: DiskCache, hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    a, b, c = (put(cache, letter, 3000, age) for letter, age in (("a", 1), ("b", 2), ("c", 3)))
    resolved = await resolve("hf://acme/lora", settings=hf)
    with cache.pinned(a):
        path = await cache.obtain(resolved)
    assert cache.get(a) is not None
    assert cache.get(b) is None
    assert cache.get(c) is not None
    assert cache.get(folder_digest(path)) == path
    bodies = len(hub.requests)
    assert await cache.obtain(resolved, folder_digest(path)) == path
    assert len(hub.requests) == bodies, "what is there is not asked for again"


async def test_when_all_is_in_use_the_disk_is_full(cache: DiskCache, hub: Hub, hf: SourceSettings) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)
    with cache.pinned(put(cache, "a", 9_500, 1)), pytest.raises(ArtifactError) as caught:
        await cache.obtain(resolved)
    assert caught.value.reason is FailureReason.DISK_FULL
    assert caught.value.transient


async def test_no_space_left_evicts_once_and_tries_again(
    cache: DiskCache, hub: Hub, hf: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)
    put(cache, "a", 100, 1)

    def full(out: object) -> None:
        if any(len(path.name) == 64 for path in cache.root.iterdir()):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch_module, "_sync", full)
    path = await cache.obtain(resolved)
    assert zoo.names_in(cache.root) == [path.name]


async def test_no_space_left_is_disk_full_and_leaves_nothing(
    tmp_path: Path, hub: Hub, hf: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)

    def full(out: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch_module, "_sync", full)
    with pytest.raises(ArtifactError) as caught:
        await fetch(resolved, tmp_path / "c")
    assert caught.value.reason is FailureReason.DISK_FULL
    assert zoo.names_in(tmp_path / "c") == []


def test_leftovers_go_but_a_running_download_of_another_process_stays(tmp_path: Path) -> None:
    for name in ("tmp", "killed"):
        (tmp_path / f".tmp-{name}").mkdir()
        (tmp_path / f".tmp-{name}" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-killed.lock").write_text(socket.gethostname())
    (tmp_path / ".tmp-live").mkdir()
    with (tmp_path / ".tmp-live.lock").open("xb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(socket.gethostname().encode())
        held.flush()
        assert remove_dead(tmp_path) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-live", ".tmp-live.lock"]
    assert remove_dead(tmp_path) == 1
    assert zoo.names_in(tmp_path) == []


def test_a_killed_download_leaves_no_folder_with_a_digests_name_and_is_cleared(tmp_path: Path, hub: Hub) -> None:
    from artifact_hub import Fault

    hub.repos["acme/lora"] = zoo.adapter_files()
    hub.faults = [Fault("adapter_model.safetensors", drip_s=0.01)]
    code = textwrap.dedent(
        f"""
        import asyncio, pathlib
        from lorapool_artifacts.fetch import fetch, resolve
        from lorapool_artifacts.settings import SourceSettings
        async def main():
            resolved = await resolve("hf://acme/lora", settings=SourceSettings(hf_endpoint={hub.url!r}))
            await fetch(resolved, pathlib.Path({str(tmp_path / "cache")!r}))
        asyncio.run(main())
        """
    )
    root = Path(fetch_module.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'crds'}:{root / 'runtime'}"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path) as process:
        while process.poll() is None and not list(tmp_path.glob("cache/.tmp-*/adapter_model.safetensors.unfinished")):
            time.sleep(0.02)
        process.kill()
    cache = DiskCache(tmp_path / "cache", high_bytes=10_000, low_bytes=6_000)
    assert all(path.name.startswith(".tmp-") for path in cache.root.iterdir())
    assert cache.entries() == []
    assert cache.start() == 1
    assert list(cache.root.iterdir()) == []


async def test_when_another_process_was_quicker_its_folder_is_taken(
    tmp_path: Path, hub: Hub, hf: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["acme/lora"] = zoo.adapter_files()
    resolved = await resolve("hf://acme/lora", settings=hf)
    path = await fetch(resolved, tmp_path)
    inode = path.stat().st_ino
    again = await fetch(resolved, tmp_path)
    assert (again, again.stat().st_ino) == (path, inode)
    assert zoo.names_in(tmp_path) == [path.name]


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 5), st.booleans()), max_size=12),
    st.integers(0, 5000),
)
def test_eviction_never_takes_a_pinned_one_nor_more_than_it_must(
    folders: list[tuple[int, int, bool]], target_bytes: int
) -> None:
    entries = [CacheEntry(f"d{index}", size, age) for index, (size, age, _) in enumerate(folders)]
    pinned = frozenset(f"d{index}" for index, (_, _, is_pinned) in enumerate(folders) if is_pinned)
    used = sum(entry.size_bytes for entry in entries)
    leaving, left = plan_eviction(entries, pinned, used_bytes=used, target_bytes=target_bytes)
    assert not {entry.digest for entry in leaving} & pinned
    assert left == used - sum(entry.size_bytes for entry in leaving)
    if left > target_bytes:
        assert {entry.digest for entry in entries} - {entry.digest for entry in leaving} == pinned
    elif leaving:
        assert left + leaving[-1].size_bytes > target_bytes
    stays = [entry for entry in entries if entry not in leaving and entry.digest not in pinned]
    assert all(gone.used_at_s <= kept.used_at_s for gone in leaving for kept in stays)

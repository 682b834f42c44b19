"""pvc:// and local folders: no path inside a volume leads out of it."""

from __future__ import annotations

import os
from pathlib import Path

import artifact_zoo as zoo
import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import inspect_adapter, inspect_adapter_folder
from lorapool_artifacts.settings import AdapterLimits, SourceSettings

LIMITS = AdapterLimits(max_rank=8, max_bytes=1_000_000)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def mounted(tmp_path: Path) -> SourceSettings:
    write(tmp_path / "pvc" / "models" / "team" / "lora", zoo.adapter_files())
    return SourceSettings(pvc_root=tmp_path / "pvc")


async def test_a_folder_of_a_claim_is_checked_fetched_and_named_by_its_digest(
    mounted: SourceSettings, tmp_path: Path
) -> None:
    seen = await inspect_adapter("pvc://models/team/lora", None, None, None, LIMITS, mounted)
    assert seen.compatibility.ok
    assert seen.digest is not None
    path = await fetch(
        await resolve("pvc://models/team/lora", seen.revision, settings=mounted), tmp_path / "cache", seen.digest
    )
    assert folder_digest(path) == seen.digest == inspect_adapter_folder(path, None, LIMITS).digest


async def test_a_process_without_mounts_says_so_transiently() -> None:
    with pytest.raises(ArtifactError) as caught:
        await resolve("pvc://models/team/lora", settings=SourceSettings())
    assert caught.value.reason is FailureReason.SOURCE_UNAVAILABLE


@pytest.mark.parametrize("uri", ["pvc://models/nowhere", "pvc://models"])
async def test_what_is_not_there_is_not_found(mounted: SourceSettings, uri: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        await resolve(uri, settings=mounted)
    assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


async def test_a_claim_that_is_not_mounted_is_said_transiently_with_the_setting_that_mounts_it(
    mounted: SourceSettings,
) -> None:
    with pytest.raises(ArtifactError, match=r"runtimeProfiles\.<name>\.volumes") as caught:
        await resolve("pvc://other/team/lora", settings=mounted)
    assert caught.value.reason is FailureReason.CLAIM_NOT_MOUNTED
    assert caught.value.transient


async def test_a_link_in_place_of_a_folder_is_not_followed(mounted: SourceSettings, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", zoo.adapter_files())
    (tmp_path / "pvc" / "models" / "link").symlink_to(outside)
    with pytest.raises(ArtifactError, match="symbolic link") as caught:
        await resolve("pvc://models/link", settings=mounted)
    assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_link_in_place_of_a_file_is_not_followed(mounted: SourceSettings, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_bytes(b"secret")
    config = tmp_path / "pvc" / "models" / "team" / "lora" / "adapter_config.json"
    config.unlink()
    config.symlink_to(secret)
    with pytest.raises(ArtifactError, match="symbolic link") as caught:
        await inspect_adapter("pvc://models/team/lora", None, None, None, LIMITS, mounted)
    assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_pipe_in_place_of_a_file_does_not_hang(mounted: SourceSettings, tmp_path: Path) -> None:
    weights = tmp_path / "pvc" / "models" / "team" / "lora" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ArtifactError) as caught:
        await resolve("pvc://models/team/lora", settings=mounted)
    assert caught.value.reason is FailureReason.SOURCE_NOT_FOUND


async def test_a_file_that_changes_between_listing_and_reading_is_noticed(
    mounted: SourceSettings, tmp_path: Path
) -> None:
    from lorapool_artifacts.sources.folder import FolderSource

    folder = tmp_path / "pvc" / "models" / "team" / "lora"
    source = FolderSource.open(folder)
    os.utime(folder / "adapter_config.json", ns=(1, 1))
    with pytest.raises(ArtifactError, match="changed") as caught:
        list(source.stream("adapter_config.json"))
    assert caught.value.transient
    source.close()

"""pvc:// and local folders: links inside a volume are followed, and none leads out of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import artifact_zoo as zoo
import pytest

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import fetch, folder_digest, resolve
from lorapool_artifacts.inspect import inspect_adapter, inspect_adapter_folder
from lorapool_artifacts.settings import AdapterLimits, SourceSettings
from lorapool_artifacts.sources.beneath import FolderBeneath, LinkLeadsOutError

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


def hub_cache(root: Path, files: dict[str, bytes]) -> str:
    """A repository as the Hugging Face cache stores it. Returns the path of its snapshot in the volume."""
    snapshot = f"models--org--tune/snapshots/{'0123456789abcdef' * 2}01234567"
    (root / snapshot).mkdir(parents=True)
    write(root / "models--org--tune" / "blobs", {f"b{number}": data for number, data in enumerate(files.values())})
    for number, name in enumerate(files):
        (root / snapshot / name).symlink_to(f"../../blobs/b{number}")
    return snapshot


def config_map(root: Path, files: dict[str, bytes]) -> str:
    """A folder as the kubelet mounts a ConfigMap."""
    write(root / "mounted" / "..2026_11_30", files)
    (root / "mounted" / "..data").symlink_to("..2026_11_30")
    for name in files:
        (root / "mounted" / name).symlink_to(f"..data/{name}")
    return "mounted"


def linked_folder(root: Path, files: dict[str, bytes]) -> str:
    write(root / "runs" / "7", files)
    (root / "latest").symlink_to("runs/7")
    return "latest"


@pytest.mark.parametrize("make", [hub_cache, config_map, linked_folder])
async def test_links_that_stay_in_the_volume_are_followed(
    make: Callable[[Path, dict[str, bytes]], str], mounted: SourceSettings, tmp_path: Path
) -> None:
    path = make(tmp_path / "pvc" / "models", zoo.adapter_files())
    plain = await inspect_adapter("pvc://models/team/lora", None, None, None, LIMITS, mounted)
    seen = await inspect_adapter(f"pvc://models/{path}", None, None, None, LIMITS, mounted)
    assert seen.compatibility.ok
    assert seen.digest == plain.digest
    fetched = await fetch(await resolve(f"pvc://models/{path}", settings=mounted), tmp_path / "cache", seen.digest)
    assert not any(file.is_symlink() for file in fetched.iterdir())


async def test_a_folder_of_the_hubs_cache_is_answered_with_its_snapshot(
    mounted: SourceSettings, tmp_path: Path
) -> None:
    path = hub_cache(tmp_path / "pvc" / "models", zoo.adapter_files())
    with pytest.raises(ArtifactError, match=f"such as pvc://models/{path}"):
        await resolve("pvc://models/models--org--tune", settings=mounted)


@pytest.mark.parametrize(
    "target",
    [
        "{outside}/adapter_config.json",
        "../../../outside/adapter_config.json",
        "../../../../../../../../../../../../../../../{outside}/adapter_config.json",
        "up/../../../outside/adapter_config.json",
        "nowhere.json",
        "adapter_config.json",
    ],
)
async def test_a_link_out_of_the_volume_or_to_nothing_is_refused(
    target: str, mounted: SourceSettings, tmp_path: Path
) -> None:
    outside = write(tmp_path / "outside", zoo.adapter_files())
    folder = tmp_path / "pvc" / "models" / "team" / "lora"
    (folder / "up").symlink_to("..")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(target.format(outside=outside))
    with pytest.raises(ArtifactError, match="leads out of the volume or to nothing") as caught:
        await inspect_adapter("pvc://models/team/lora", None, None, None, LIMITS, mounted)
    assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_folder_that_links_out_of_the_volume_is_refused(mounted: SourceSettings, tmp_path: Path) -> None:
    write(tmp_path / "outside", zoo.adapter_files())
    for target in (tmp_path / "outside", Path("../../outside")):
        link = tmp_path / "pvc" / "models" / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(ArtifactError, match="leads out of the volume") as caught:
            await resolve("pvc://models/link", settings=mounted)
        assert caught.value.reason is FailureReason.INVALID_SOURCE


async def test_a_link_does_not_leave_the_folder_that_a_namespace_may_read(
    mounted: SourceSettings, tmp_path: Path
) -> None:
    team_b = tmp_path / "pvc" / "models" / "team-b"
    write(team_b / "own", zoo.adapter_files())
    (team_b / "theirs").symlink_to("../team/lora")
    (team_b / "mine").symlink_to("own")
    bounded = mounted.model_copy(update={"pvc_boundary": "team-b"})
    assert (await resolve("pvc://models/team-b/mine", settings=bounded)).files
    assert (await resolve("pvc://models/team-b/theirs", settings=mounted)).files
    with pytest.raises(ArtifactError, match="leads out of the volume"):
        await resolve("pvc://models/team-b/theirs", settings=bounded)


def test_a_folder_that_is_swapped_for_a_link_meanwhile_does_not_lead_out(tmp_path: Path) -> None:
    """`..` returns to the folder that was open, wherever a rename has moved it meanwhile."""
    inner = tmp_path / "root" / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "root" / "a" / "up").symlink_to("b/../../secret")
    folder = FolderBeneath(tmp_path / "root")
    folder.enter(["a"])
    (tmp_path / "root" / "a").rename(tmp_path / "moved")
    with pytest.raises((LinkLeadsOutError, FileNotFoundError)):
        os.close(folder.open_file("up"))
    folder.close()


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

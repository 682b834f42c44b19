"""A folder on disk is hashed and checked once, and again as soon as one of its files has changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_kit import save_adapter, tiny_model

from lorapool_api.base_modules import BaseModule
from lorapool_api.common import FailureReason
from lorapool_api.protocol import ResolveRequest, SourceRef, Tier
from lorapool_artifacts.cache import DiskCache
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.policy import SourceRules
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_runtime.adapters import disk_store as store_module
from lorapool_runtime.adapters.disk_store import DiskStore
from lorapool_runtime.adapters.source_access import SourceAccess

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MODULES = [BaseModule(f"model.layers.{layer}.self_attn.q_proj", 64, 64) for layer in range(2)]
SOURCE = SourceRef(uri="pvc://claim/one")


class World:
    """A store of one adapter on a volume; `inspected` folders so far."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        save_adapter(folder / "claim" / "one", tiny_model("Llama"), r=2, target_modules=["q_proj"])
        (folder / "claim" / "one" / "README.md").unlink(missing_ok=True)
        self.inspected = 0
        self.cache = DiskCache(folder / "cache", high_bytes=2**24, low_bytes=2**23)
        self.cache.start()
        facts = BaseFacts.of(MODULES)
        self.rules = folder / "rules.json"
        self.rules.write_text(SourceRules(owner="owner").model_dump_json())
        access = SourceAccess(SourceSettings(pvc_root=folder), self.rules)
        self.store = DiskStore(self.cache, facts, access, max_rank=8, fetch_limits=FetchLimits())
        inspect = store_module.inspect_adapter_folder

        def counted(*given: object) -> object:
            self.inspected += 1
            return inspect(*given)  # type: ignore[arg-type]  # whatever it is given

        patch.setattr(store_module, "inspect_adapter_folder", counted)

    def digest(self) -> str:
        answer = asyncio.run(self.store.resolve(ResolveRequest(source=SOURCE, namespace="owner")))
        assert answer.digest is not None
        return answer.digest

    def fetch(self, digest: str, max_bytes: int | None = None, *, namespace: str = "owner") -> Tier:
        return asyncio.run(self.store.fetch(digest, SOURCE, max_bytes, namespace=namespace)).tier

    def weights(self, digest: str) -> Path:
        folder = self.cache.get(digest)
        assert folder is not None
        return folder / "adapter_model.safetensors"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path, patch)


def test_a_folder_that_did_not_change_is_inspected_once(world: World) -> None:
    digest = world.digest()
    assert [world.fetch(digest) for _ in range(3)] == [Tier.SOURCE, Tier.DISK, Tier.DISK]
    assert world.inspected == 1


def test_a_file_changed_on_disk_is_detected_even_with_the_same_size_and_mtime(world: World) -> None:
    digest = world.digest()
    world.fetch(digest)
    weights = world.weights(digest)
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(ArtifactError, match="not the requested sha256") as refused:
            world.fetch(digest)
        assert refused.value.reason is FailureReason.DIGEST_MISMATCH
    assert world.inspected == 3


def test_a_folder_is_checked_again_against_a_tighter_limit(world: World) -> None:
    digest = world.digest()
    world.fetch(digest)
    with pytest.raises(ArtifactError) as refused:
        world.fetch(digest, max_bytes=100)
    assert refused.value.reason is FailureReason.TOO_LARGE
    assert world.fetch(digest) is Tier.DISK
    assert world.inspected == 2


def test_a_guest_reads_no_folder_of_the_owners_volume_by_any_road(world: World) -> None:
    digest = world.digest()
    refused = asyncio.run(world.store.resolve(ResolveRequest(source=SOURCE, namespace="guest"))).failure
    assert refused is not None
    assert refused.reason == "SourceNotPermitted"
    assert world.fetch(digest) is Tier.SOURCE
    with pytest.raises(ArtifactError) as caught:  # though the files are on this disk by now
        world.fetch(digest, namespace="guest")
    assert caught.value.reason is FailureReason.SOURCE_NOT_PERMITTED


def test_a_grant_of_the_bases_owner_lets_a_guest_read_below_its_prefix(world: World) -> None:
    rules = SourceRules(owner="owner", grants={"guest": ("pvc://claim/one/",), "other": ("pvc://claim/on",)})
    world.rules.write_text(rules.model_dump_json())
    digest = world.digest()
    assert world.fetch(digest, namespace="guest") is Tier.SOURCE
    with pytest.raises(ArtifactError, match=r"spec\.access\.sources"):
        world.fetch(digest, namespace="other")


def test_a_guest_leaves_its_part_of_a_volume_by_no_link(world: World, tmp_path: Path) -> None:
    (tmp_path / "claim" / "theirs").mkdir()
    (tmp_path / "claim" / "theirs" / "lora").symlink_to("../one")
    world.rules.write_text(SourceRules(owner="owner", grants={"guest": ("pvc://claim/theirs/",)}).model_dump_json())
    link = SourceRef(uri="pvc://claim/theirs/lora")
    answers = {
        namespace: asyncio.run(world.store.resolve(ResolveRequest(source=link, namespace=namespace)))
        for namespace in ("owner", "guest")
    }
    assert answers["owner"].failure is None
    refused = answers["guest"].failure
    assert refused is not None
    assert "leads out of the volume" in refused.message


def test_without_readable_rules_nothing_is_read_and_it_is_tried_again(world: World) -> None:
    digest = world.digest()
    for content in ("", '{"owner": "owner", "unknown": 1}'):
        world.rules.write_text(content)
        with pytest.raises(ArtifactError, match="rules for sources") as caught:
            world.fetch(digest)
        assert caught.value.transient

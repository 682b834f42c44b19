"""A runtime reads a guest's private source with the guest's credentials, once they have arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import artifact_zoo as zoo
import pytest
from artifact_hub import Hub

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import resolve
from lorapool_artifacts.policy import SourceRules
from lorapool_artifacts.settings import STORE_CA, STORE_TOKEN, STORE_URL, SourceSettings
from lorapool_runtime.adapters import source_access
from lorapool_runtime.adapters.source_access import SourceAccess

PRIVATE = "hf://team-b/private"


@pytest.fixture
def access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SourceAccess]:
    monkeypatch.setattr(source_access, "ARRIVAL_S", 0.2)
    rules = tmp_path / "rules.json"
    rules.write_text(SourceRules(owner="owner", grants={"team-c": ("hf://team-b/private",)}).model_dump_json())
    with Hub() as hub:
        hub.repos["team-b/private"] = zoo.adapter_files()
        answer = hub.answer

        def locked(path: str) -> tuple[int, dict[str, str], bytes]:
            known = ("Bearer of-the-release", "Bearer of-team-b")
            allowed = hub.requests[-1][2].get("authorization") in known
            return answer(path) if allowed else (401, {}, b"")

        hub.answer = locked  # type: ignore[method-assign]
        yield SourceAccess(SourceSettings(hf_endpoint=hub.url, hf_token="of-the-release"), rules)


async def read(access: SourceAccess, namespace: str) -> FailureReason | None:
    try:
        async with access.reading(namespace, PRIVATE) as settings:
            await resolve(PRIVATE, settings=settings)
    except ArtifactError as error:
        return error.reason
    return None


async def test_the_shared_credentials_are_for_the_owner_and_for_what_it_grants(access: SourceAccess) -> None:
    access.give({"team-b": {}, "team-d": {}})
    assert await read(access, "owner") is None
    assert await read(access, "team-c") is None
    assert await read(access, "team-d") is FailureReason.UNAUTHORIZED
    assert await read(access, "") is FailureReason.SOURCE_UNAVAILABLE


async def test_a_read_that_is_here_before_the_guests_credentials_waits_for_them(access: SourceAccess) -> None:
    first = asyncio.create_task(read(access, "team-b"))
    await asyncio.sleep(0)
    access.give({"team-d": {}})
    await asyncio.sleep(0)
    access.give({"team-b": {"HF_TOKEN": "of-team-b"}})
    assert await first is None


async def test_an_object_of_the_store_is_read_once_the_store_is_known(access: SourceAccess) -> None:
    async def store_of(namespace: str) -> str | None:
        async with access.reading(namespace, f"store://{namespace}/adapters/a") as settings:
            return settings.store_url

    first = asyncio.create_task(store_of("owner"))
    await asyncio.sleep(0)
    access.give({"owner": {STORE_URL: "http://store", STORE_TOKEN: "t", STORE_CA: ""}})
    assert await first == "http://store"


async def test_until_a_guests_credentials_arrive_a_refusal_is_tried_again(access: SourceAccess) -> None:
    assert await read(access, "team-b") is FailureReason.SOURCE_UNAVAILABLE
    access.give({"team-b": {"HF_TOKEN": "of-team-b"}})
    assert await read(access, "team-b") is None
    access.give({"team-b": {"HF_TOKEN": "revoked"}})
    assert await read(access, "team-b") is FailureReason.UNAUTHORIZED

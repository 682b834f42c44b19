"""A runtime with a list of adapters to preload is ready once each is loaded or has failed, within a time limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import FakeStore, Served, descriptor, key_of, serving, source_error, until

from lorapool_api.common import FailureReason
from lorapool_api.protocol import Preload, PreloadList


def listed(file: Path, *names: str) -> Path:
    items = [Preload(uid=key_of(n).uid, digest=key_of(n).digest, descriptor=descriptor(n)) for n in names]
    file.write_text(PreloadList(adapters=items).model_dump_json(by_alias=True))
    return file


@asynccontextmanager
async def starting(folder: Path, store: FakeStore, **settings: Any) -> AsyncIterator[Served]:
    async with serving(folder, store=store, **settings) as served:
        yield served


async def readiness(served: Served) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"{served.url}/readyz") as response:
        return response.status, (await response.text()).strip()


async def test_it_is_ready_once_the_listed_adapters_are_loaded(byte_tokenizer: Path, tmp_path: Path) -> None:
    store, file = FakeStore(delay_s=0.5), listed(tmp_path / "preload.json", "a", "b")
    async with starting(byte_tokenizer, store, preload_file=file) as served:
        assert await readiness(served) == (503, "loading")
        assert not served.runtime.snapshot().ready
        assert served.runtime.snapshot().ready_unix_s is None
        await until(lambda: served.runtime.ready)
        loaded = served.runtime.snapshot()
        assert loaded.ready_unix_s is not None
        assert loaded.started_unix_s + 0.5 <= loaded.ready_unix_s
        assert served.engine.loads == {"a": 1, "b": 1}
        assert await readiness(served) == (200, "ready")


async def test_one_that_fails_does_not_hold_it_up(byte_tokenizer: Path, tmp_path: Path) -> None:
    store, file = FakeStore(), listed(tmp_path / "preload.json", "bad", "good")
    store.errors["s3://bucket/bad"] = [source_error(FailureReason.SOURCE_NOT_FOUND)]
    async with starting(byte_tokenizer, store, preload_file=file) as served:
        await until(lambda: served.runtime.ready)
        assert served.engine.loads == {"good": 1}


async def test_one_that_hangs_holds_it_up_no_longer_than_the_limit(byte_tokenizer: Path, tmp_path: Path) -> None:
    store, file = FakeStore(delay_s=3600), listed(tmp_path / "preload.json", "slow")
    async with starting(byte_tokenizer, store, preload_file=file, preload_timeout_s=0.1) as served:
        assert not served.runtime.ready
        await until(lambda: served.runtime.ready)


@pytest.mark.parametrize("text", [None, "", "{", '{"adapters": [{"uid": 1}]}'])
async def test_a_missing_or_malformed_list_loads_nothing(
    byte_tokenizer: Path, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "preload.json"
    if text is not None:
        file.write_text(text)
    async with starting(byte_tokenizer, FakeStore(), preload_file=file) as served:
        assert await readiness(served) == (200, "ready")

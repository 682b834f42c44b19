"""`GET` and `DELETE /v1/usage` of a runtime that serves: what is recorded, and who asks how."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes_runtime import FakeClock, FakeEngine, FakeStore, Served, digest_of_name, until
from fakes_runtime import serving as serving_by

from lorapool_api.usage_protocol import (
    BootRecord,
    Ended,
    RequestRecord,
    ResidencyRecord,
    ResidencyType,
    RuntimeRecord,
    UsagePage,
)


def serving(tokenizer: Path, **settings: Any) -> contextlib.AbstractAsyncContextManager[Served]:
    """A runtime in which no minute ends."""
    return serving_by(tokenizer, clock=FakeClock().clock(), **settings)


async def call(served: Served, method: str, query: str = "", body: Any = None, path: str = "/v1/usage", **headers: str):
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{served.url}{path}{query}", json=body, headers=headers) as response,
    ):
        return response.status, await response.text()


async def page(served: Served, query: str = "") -> UsagePage:
    status, text = await call(served, "GET", query)
    assert status == 200
    return UsagePage.model_validate_json(text)


async def records(served: Served) -> list[RuntimeRecord]:
    return (await page(served)).records


async def ask(
    served: Served, *, model: str = "tiny", stream: bool = False, headers: dict[str, str] | None = None, **more: Any
):
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": stream, **more}
    return await call(served, "POST", "", body, "/v1/chat/completions", **(headers or {}))


def requests(found: list[RuntimeRecord]) -> list[RequestRecord]:
    return [record for record in found if isinstance(record, RequestRecord)]


async def test_a_request_is_recorded_with_who_pays(byte_tokenizer: Path, tmp_path: Path) -> None:
    async with serving(byte_tokenizer, usage_dir=tmp_path) as served:
        headers = {"x-lorapool-attempt": "attempt-1", "x-lorapool-key": "key-uid", "x-lorapool-project": "team-a"}
        status, text = await ask(served, max_tokens=4, headers=headers | {"x-request-id": "mine"})
        assert status == 200
        usage = json.loads(text)["usage"]
        boot, request = await records(served)
        assert isinstance(boot, BootRecord)
        assert boot.slots == 4
        assert isinstance(request, RequestRecord)
        assert (request.attempt, request.key_uid, request.project, request.request_id) == (
            "attempt-1", "key-uid", "team-a", "mine",
        )  # fmt: skip
        assert (request.uid, request.outcome, request.prompt_tokens, request.completion_tokens) == (
            "", Ended.COMPLETED, usage["prompt_tokens"], usage["completion_tokens"],
        )  # fmt: skip
        assert served.runtime.usage.base.prompt_tokens == usage["prompt_tokens"]
        assert any(name.endswith(".journal") for name in os.listdir(tmp_path))


async def test_the_prompt_counts_once_for_all_answers(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served:
        await ask(served, max_tokens=4)
        await ask(served, max_tokens=4, n=3)
        one, three = requests(await records(served))
        assert (three.sequences, three.prompt_tokens) == (3, one.prompt_tokens)
        assert three.completion_tokens == 3 * one.completion_tokens


async def test_a_client_that_leaves_is_recorded_with_what_was_computed(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.002)
    async with serving(byte_tokenizer, engine=engine) as served:
        asking = asyncio.create_task(ask(served, stream=True, max_tokens=300))
        await until(lambda: engine.tokens_made >= 20)
        asking.cancel()
        await until(lambda: served.runtime.accounting.journal.last_seq >= 2)
        [request] = requests(await records(served))
        assert request.outcome is Ended.CANCELLED
        assert request.completion_tokens == engine.tokens_made


@pytest.mark.parametrize(
    ("header", "value", "recorded"),
    [("x-lorapool-attempt", "a\tb c" + "d" * 200, "abc" + "d" * 125), ("x-lorapool-project", "ü/..", "/..")],
)
async def test_headers_that_are_no_identifiers_are_recorded_without_what_is_not_printed(
    byte_tokenizer: Path, header: str, value: str, recorded: str
) -> None:
    async with serving(byte_tokenizer) as served:
        assert (await ask(served, max_tokens=1, headers={header: value}))[0] == 200
        [request] = requests(await records(served))
        assert recorded in (request.attempt, request.project)


async def test_a_reader_waits_for_the_next_record_and_acknowledges(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served:
        boot_id = served.runtime.boot_id
        waiting = asyncio.create_task(page(served, f"?boot={boot_id}&after=1&wait=20"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await ask(served, max_tokens=1)
        assert [record.seq for record in (await waiting).records] == [2]
        assert (await call(served, "DELETE", f"?boot={boot_id}&through=1"))[0] == 204
        assert [record.seq for record in await records(served)] == [2]
        assert (await call(served, "DELETE", f"?boot={boot_id}&through=999999"))[0] == 204
        assert (await call(served, "DELETE", "?boot=another&through=3"))[0] == 204
        empty = await page(served)
        assert (empty.records, empty.boots[0].first_seq, empty.boots[0].last_seq) == ([], 3, 2)
        other = await page(served, "?boot=unknown&after=0&wait=20")  # nothing will ever follow
        assert (other.boot_id, other.records, other.boots[-1].boot_id) == ("unknown", [], boot_id)


@pytest.mark.parametrize(
    ("method", "query", "word"),
    [
        ("GET", "?after=-1", "after"),
        ("GET", "?after=1.5", "after"),
        ("GET", "?after=9999999999999999999", "after"),
        ("GET", "?wait=forever", "wait"),
        ("GET", "?boot=../../etc", "boot"),
        ("DELETE", "", "through"),
        ("DELETE", "?boot=b", "through"),
        ("DELETE", "?through=5", "through"),
        ("DELETE", "?boot=b&through=all", "through"),
    ],
)
async def test_bad_parameters_are_refused_in_words(byte_tokenizer: Path, method: str, query: str, word: str) -> None:
    async with serving(byte_tokenizer) as served:
        status, text = await call(served, method, query)
        assert status == 400
        assert f"`{word}`" in json.loads(text)["error"]["message"]
        assert len(await records(served)) == 1


async def test_loads_and_unloads_are_recorded_and_the_requests_have_their_adapter(
    byte_tokenizer: Path, tmp_path: Path
) -> None:
    async with serving(byte_tokenizer, store=FakeStore(), usage_dir=tmp_path) as served:
        digest = digest_of_name("one")
        descriptor = {"display": "demo/one", "source": {"uri": "file:///one"}, "namespace": "demo"}
        status, text = await call(served, "PUT", "", descriptor, f"/v1/adapters/uid-1/{digest}")
        assert status == 200, text
        status, text = await ask(served, max_tokens=2, headers={"x-lorapool-adapter": f"uid-1@{digest}"})
        assert status == 200, text
        assert (await call(served, "DELETE", "", None, f"/v1/adapters/uid-1/{digest}"))[0] == 200
        found = await records(served)
        residency = [record for record in found if isinstance(record, ResidencyRecord)]
        assert [(one.type, one.uid, one.digest, one.model) for one in residency] == [
            (ResidencyType.LOADED, "uid-1", digest, "demo/one"),
            (ResidencyType.UNLOADED, "uid-1", digest, "demo/one"),
        ]
        [request] = requests(found)
        assert (request.uid, request.digest, request.model) == ("uid-1", digest, "demo/one")


async def test_the_counters_agree_with_the_records(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served:
        for number in range(1, 6):
            await ask(served, max_tokens=number)
        text = served.runtime.metrics.render().decode()
        found = requests(await records(served))

        def shown(name: str, **labels: str) -> float:
            wanted = name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
            return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(wanted)))

        total = shown("lorapool_runtime_tokens_total", base="tiny", type="completion")
        assert total == sum(one.completion_tokens for one in found) == served.runtime.usage.base.completion_tokens
        assert shown("lorapool_runtime_cached_tokens_total", base="tiny") == sum(one.cached_tokens for one in found)
        assert shown("lorapool_runtime_usage_records", base="tiny") == len(await records(served))

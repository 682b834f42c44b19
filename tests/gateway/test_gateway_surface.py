"""What clients and fleets look for around the inference routes: health, version, headers, CORS, clear refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import FakeRuntime, digest_of
from fakes_runtime import Served, save_byte_tokenizer, serving
from gateway_world import KEY, World, world

from lorapool_api.protocol import token_sha256

PAGE = "https://app.example.com"
HEADERS = ("x-request-id", "openai-processing-ms")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def served(tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(tokenizer, token_sha256=token_sha256("t" * 64), pod_uid="pod") as runtime:
        yield runtime


@pytest.fixture
async def here(served: Served) -> AsyncIterator[World]:
    async with world() as made:
        made.base()
        made.adapter("route")
        made.replica(served.url)
        yield made


async def get(here: World, path: str, *, key: str | None = KEY, method: str = "GET", **headers: str) -> Any:
    own = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with here.session.request(method, here.url + path, headers={**own, **headers}) as response:
        await response.read()
        return response


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_needs_no_key_and_ends_with_the_drain(here: World, path: str) -> None:
    assert (await get(here, path, key=None)).status == 200
    here.gateway.draining = True
    assert (await get(here, path, key=None)).status == 503


async def test_the_version_is_given_to_keys_only(here: World) -> None:
    assert (await get(here, "/version", key=None)).status == 401
    assert set(await (await get(here, "/version")).json()) == {"version"}


async def test_a_model_has_its_context_length(here: World, served: Served) -> None:
    here.base("wide", maxModelLen=8192)
    async with here.client() as client:
        models = {model.id: model.model_dump() for model in (await client.models.list()).data}
    assert models["demo/wide"]["max_model_len"] == 8192
    assert models["demo/route"]["max_model_len"] == models["demo/tiny"]["max_model_len"] == 2048
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="t" * 64) as client:
        assert (await client.models.list()).data[0].model_dump()["max_model_len"] == 512


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "no embeddings"),
        ("/v1/messages", "LiteLLM"),
        ("/v1/responses/resp_1", "No answers are stored"),
        ("/v1/nothing", "There is no /v1/nothing."),
    ],
)
async def test_what_is_not_there_is_a_404_with_the_remedy(here: World, path: str, words: str) -> None:
    error = (await (await here.post(b"{}", path=path)).json())["error"]
    assert error["code"] == "not_found"
    assert words in error["message"]


async def test_every_answer_has_the_headers_that_fleets_look_for(here: World) -> None:
    adapter = f"demo/route@{digest_of('route')}"
    asked = here.ask("route", max_tokens=2)
    response_body = {"model": "route", "input": "hi"}
    for path, body in (
        ("/v1/chat/completions", asked),
        ("/v1/chat/completions", {**asked, "stream": True}),
        ("/v1/completions", {"model": "route", "prompt": "x"}),
        ("/v1/responses", response_body),
        ("/v1/responses", {**response_body, "stream": True}),
    ):
        response = await here.post(body, path=path, headers={"x-request-id": "trace-7"})
        assert (response.status, response.headers["x-request-id"]) == (200, "trace-7")
        assert response.headers["x-lorapool-adapter"] == adapter
        assert int(response.headers["openai-processing-ms"]) >= 0
    for response in (
        await here.post(b"{", path="/v1/chat/completions"),
        await here.post({**asked, "top_k": "x"}),
        await get(here, "/v1/models"),
        await get(here, "/nothing"),
        await get(here, "/v1/models", key=None),
        await get(here, "/health", key=None),
    ):
        assert all(name in response.headers for name in HEADERS), response


async def test_keywords_that_are_not_enforced_are_reported_to_the_client(here: World) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    asked = here.ask("route", max_tokens=2, tools=[{"type": "function", "function": function}])
    for stream in (False, True):
        response = await here.post({**asked, "stream": stream})
        assert response.headers["x-lorapool-relaxed"] == "tools[0].function.parameters.properties.a.not"
    assert "x-lorapool-relaxed" not in (await here.post(here.ask("route"))).headers


@pytest.mark.parametrize("stream", [False, True])
async def test_gateway_and_runtime_count_the_tokens_of_a_response_once(
    here: World, served: Served, stream: bool
) -> None:
    answer = await here.post({"model": "route", "input": "hi", "stream": stream}, path="/v1/responses")
    text = await answer.text()
    assert "[DONE]" not in text
    assert "lorapool-usage" not in text
    assert ("event: response.completed\n" in text) is stream
    [report] = served.runtime.snapshot().adapters
    for kind, tokens in (("prompt", report.usage.prompt_tokens), ("completion", report.usage.completion_tokens)):
        assert tokens > 0
        assert here.sample("tokens_total", base="demo/tiny", adapter="demo/route", type=kind) == tokens
    assert report.usage.cancelled_requests == 0


# --- CORS ----------------------------------------------------------------------------------


async def preflight(here: World, path: str = "/v1/chat/completions", origin: str = PAGE) -> Any:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    wanted = {"Access-Control-Request-Headers": "authorization,content-type"}
    return await get(here, path, key=None, method="OPTIONS", **asked, **wanted)


async def test_a_page_of_a_permitted_origin_may_ask_and_read(served: Served) -> None:
    async with world(cors_origins=frozenset({PAGE})) as here:
        here.base()
        here.replica(served.url)
        asked = await preflight(here)
        assert asked.status == 204
        assert asked.headers["Access-Control-Allow-Origin"] == PAGE
        assert asked.headers["Access-Control-Allow-Methods"] == "POST"
        assert asked.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        for body in (here.ask("tiny"), here.ask("tiny", stream=True), here.ask("nope")):
            response = await here.post(body, headers={"Origin": PAGE})
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            assert response.headers["Vary"] == "Origin"
            assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Origin" not in (await here.post(here.ask("tiny"))).headers


async def test_a_page_of_another_origin_is_not_permitted(served: Served) -> None:
    async with world(cors_origins=frozenset({PAGE})) as here:
        refused = await preflight(here, origin="https://evil.example.com")
        assert refused.status == 405
        assert not any(name.startswith("Access-Control") for name in refused.headers)
    async with world() as here:
        assert (await preflight(here)).status == 405


async def test_every_page_may_ask_where_all_origins_are_permitted() -> None:
    async with FakeRuntime().running() as runtime, world(cors_origins=frozenset({"*"})) as here:
        here.base()
        here.replica(runtime)
        assert (await preflight(here, origin="http://localhost:3000")).headers["Access-Control-Allow-Origin"] == "*"
        assert (await preflight(here, "/nothing")).status == 404

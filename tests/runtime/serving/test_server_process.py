"""The token, clients that leave, starting, draining, health, metrics, settings, the base's folder."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from fakes_runtime import (
    VOCAB,
    FakeClock,
    FakeEngine,
    FakeStore,
    Served,
    descriptor,
    key_of,
    listening,
    save_byte_tokenizer,
    serving,
    settings_for_tests,
    until,
)

from lorapool_api.liveness import Heartbeat, in_own_thread
from lorapool_api.openai import InvalidRequestError
from lorapool_api.protocol import HEADER_TENANT, ROUTE_CREDENTIALS, NamespaceCredentials, token_sha256
from lorapool_api.settings import SettingsError
from lorapool_api.trust.metrics_access import MetricsAccess
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import SourceSettings
from lorapool_runtime.openai import encoding, json_body
from lorapool_runtime.openai.chats.chat_format import ExtraTokens
from lorapool_runtime.openai.chats.chat_formats import ChatFormats
from lorapool_runtime.openai.chats.fair_pool import FairPool
from lorapool_runtime.openai.chats.tokenizer import Tokenizer, TokenizerError
from lorapool_runtime.serving.probes import probes
from lorapool_runtime.serving.server import make_app
from lorapool_runtime.serving.service import Runtime
from lorapool_runtime.settings import read_settings
from lorapool_runtime.startup import BaseError, BaseFolder, base_folder, bring_up, reason_of
from lorapool_runtime.startup_progress import StartupProgress

HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": HI}
TOKEN = "t" * 64

# --- the token ------------------------------------------------------------------------------


def routes_of(app: web.Application) -> list[tuple[str, str]]:
    """(method, path) of every route there is, with something in the place of its variables."""
    found = []
    for route in app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        for name, value in (("uid", "u"), ("digest", key_of("x").digest), ("model", "m")):
            path = path.replace("{" + name + "}", value)
        found.append((route.method, path))
    return found


async def test_every_route_but_the_two_probes_asks_for_the_token(byte_tokenizer: Path) -> None:
    routes = routes_of(make_app(Runtime(settings_for_tests())))
    assert len(routes) >= 14
    async with (
        serving(byte_tokenizer, token_sha256=token_sha256(TOKEN)) as served,
        aiohttp.ClientSession(served.url) as session,
    ):
        for method, path in [*routes, ("GET", "/"), ("GET", "/v1/nothing"), ("POST", "/healthz")]:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": TOKEN},
                {"Authorization": f"Basic {TOKEN}"},
                {"Host": "x/healthz?"},
            ):
                async with session.request(method, path, headers=headers) as response:
                    is_open = path in ("/healthz", "/readyz") and method in ("GET", "HEAD")
                    assert response.status == (200 if is_open else 401), (method, path, headers)
        async with session.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}) as response:
            assert response.status == 200


async def test_a_raw_host_header_opens_nothing(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer, token_sha256=token_sha256(TOKEN)) as served:
        host, port = served.url.removeprefix("http://").split(":")
        for target in ("/v1/runtime", "http://x/healthz/../v1/runtime", "//healthz/v1/runtime", "*"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET {target} HTTP/1.1\r\nHost: x/healthz?\r\nConnection: close\r\n\r\n".encode())
            status = int((await reader.readline()).split()[1])
            assert status in (400, 401), target
            writer.close()
            await writer.wait_closed()


# --- leaving clients ------------------------------------------------------------------------


async def test_a_client_that_leaves_mid_stream_ends_its_generation_within_two_tokens(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.02)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        body = {**CHAT, "model": "team/poet", "stream": True}
        response = await session.post("/v1/chat/completions", json=body)
        seen = 0
        async for line in response.content:
            seen += b'"content":"x' in line
            if seen == 5:
                break
        made = engine.tokens_made
        response.close()
        await until(lambda: served.runtime.snapshot().in_flight == 0, timeout_s=1.0)
        assert engine.tokens_made - made <= 2
        (report,) = served.runtime.adapters.reports()
        assert (report.in_flight, report.usage.cancelled_requests) == (0, 1)
        assert report.usage.completion_tokens == engine.tokens_made  # what was computed is counted
        assert report.usage.prompt_tokens > 0


async def test_a_client_that_leaves_before_a_whole_answer_ends_its_generation_too(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.02)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        asking = asyncio.create_task(session.post("/v1/chat/completions", json=CHAT))
        await until(lambda: engine.tokens_made >= 3)
        made = engine.tokens_made
        asking.cancel()
        await until(lambda: served.runtime.snapshot().in_flight == 0, timeout_s=1.0)
        assert engine.tokens_made - made <= 2


async def test_a_client_that_reads_nothing_is_disconnected_and_its_slot_released(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 100, step_s=0.0, max_model_len=400_000)
    async with serving(byte_tokenizer, engine=engine, write_timeout_s=0.3) as served:
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        wish = {**CHAT, "stream": True, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}  # long events
        body = json.dumps(wish).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readline()
        await until(lambda: served.runtime.snapshot().in_flight == 0, timeout_s=20.0)
        writer.transport.abort()


async def test_a_template_that_takes_too_long_is_refused_and_other_prompts_are_encoded(tmp_path: Path) -> None:
    slow = "{% for a in range(90000) %}{% for b in range(300) %}{% endfor %}{% endfor %}"
    folder = save_byte_tokenizer(tmp_path, chat_template=slow)
    tokenizer = Tokenizer(folder, threads=2, timeout_s=0.2)
    formats = ChatFormats(tokenizer, rows=VOCAB, eos_ids=())
    assert formats.base.template is None
    assert "did not end within" in formats.base.problem
    with pytest.raises(InvalidRequestError) as caught:
        await tokenizer.prompt_of_messages(HI, chat=replace(formats.base, template=slow))
    assert caught.value.code == "chat_template_timeout"
    assert await tokenizer.prompt_of_text("ab", tenant="another") == (97, 98)
    tokenizer.close()


async def test_other_work_goes_on_while_a_long_text_is_tokenized(byte_tokenizer: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer, threads=1, timeout_s=60.0)
    encoding = asyncio.create_task(tokenizer.prompt_of_text("long " * 200_000))
    passes = 0
    while not encoding.done():
        await asyncio.sleep(0)
        passes += 1
    assert len(await encoding) == 1_000_000
    assert passes > 1000  # about 20 while the tokenizer keeps Python's lock
    tokenizer.close()


@pytest.mark.parametrize(
    ("path", "wish"),
    [
        ("/v1/completions", {"prompt": "a" * 200_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 100_000}] * 2}),
    ],
)
async def test_a_text_that_cannot_fit_the_context_is_refused_before_it_is_tokenized(
    byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, path: str, wish: dict[str, Any]
) -> None:
    for method in ("_encode", "_chat_prompt"):
        monkeypatch.setattr(Tokenizer, method, lambda *_: pytest.fail("the text was tokenized"))
    async with (
        serving(byte_tokenizer) as served,
        aiohttp.ClientSession(served.url) as session,
        session.post(path, json={"model": "tiny", **wish}) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "context_length_exceeded"


async def test_the_long_prompts_of_one_tenant_do_not_delay_the_prompts_of_another(
    byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, run, go_on = Tokenizer._encode, FairPool.run, threading.Event()
    arrived = []

    def slow(tokenizer: Tokenizer, text: str, extra: ExtraTokens, start_token: bool) -> tuple[int, ...]:
        if text.startswith("long"):
            assert go_on.wait(20)
        return encode(tokenizer, text, extra, start_token)

    async def counted(pool: FairPool, tenant: str, work: Any) -> Any:
        arrived.append(tenant)
        return await run(pool, tenant, work)

    monkeypatch.setattr(Tokenizer, "_encode", slow)
    monkeypatch.setattr(FairPool, "run", counted)
    async with serving(byte_tokenizer) as served, aiohttp.ClientSession(served.url) as session:

        async def ask(tenant: str, prompt: str) -> int:
            wish, headers = {"model": "tiny", "prompt": prompt, "max_tokens": 1}, {HEADER_TENANT: tenant}
            async with session.post("/v1/completions", json=wish, headers=headers) as response:
                return response.status

        flood = [asyncio.create_task(ask("a", f"long {number}")) for number in range(4)]
        await until(lambda: arrived == ["a"] * 4)
        try:
            assert await ask("b", "short") == 200
            assert not any(task.done() for task in flood)
        finally:
            go_on.set()
        assert [await task for task in flood] == [200] * 4


async def test_a_tenant_whose_callers_give_up_takes_no_more_threads_than_before() -> None:
    pool, go_on = FairPool(2, "test"), threading.Event()
    begun = []

    def work() -> None:
        begun.append(threading.current_thread().name)
        assert go_on.wait(20)

    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pool.run("a", work)
    assert len(begun) == 1
    assert await pool.run("b", lambda: "done") == "done"
    go_on.set()
    assert await pool.run("a", lambda: "again") == "again"
    pool.close()


async def test_an_error_in_a_thread_reaches_its_caller() -> None:
    def fail() -> None:
        raise ValueError("no")

    pool = FairPool(1, "test")
    with pytest.raises(ValueError, match="no"):
        await pool.run("a", fail)
    pool.close()


@pytest.mark.parametrize("value", [b"[],", b'{"a":1},'])
def test_a_body_of_very_many_small_values_is_refused_before_it_is_parsed(
    value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body.json, "loads", lambda *_, **__: pytest.fail("the body was parsed"))
    body = b'{"model":"tiny","x":[' + value * (4 * 2**20 // len(value)) + b"1]}"
    with pytest.raises(InvalidRequestError, match="more than 100000 lists and objects"):
        json_body.parse_json_object(body)


def test_braces_in_a_text_are_no_objects() -> None:
    text = 'if (a[0]) { s = "\\"; }\n' * 100_000
    assert json_body.parse_json_object(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ({"max_tokens": 33}, 200),
        ({"max_tokens": 34}, 400),
        ({"max_tokens": 34, "stream": True}, 200),
        ({"max_tokens": 34, "logprobs": 1}, 200),
        ({"max_tokens": 34, "logprobs": None}, 200),
        ({"max_tokens": 17, "n": 2}, 400),
        ({"max_tokens": 1, "echo": True, "prompt": "a" * 32}, 200),
        ({"max_tokens": 1, "echo": True, "prompt": "a" * 33}, 400),
        ({"max_tokens": 0, "echo": True, "prompt": "a" * 34}, 400),
    ],
)
async def test_a_whole_answer_that_could_be_very_large_is_refused_before_anything_is_generated(
    byte_tokenizer: Path, wish: dict[str, Any], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "MAX_WHOLE_LOGPROBS", 100)
    engine = FakeEngine()
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        body = {"model": "tiny", "prompt": "a", "logprobs": 2, **wish}
        async with session.post("/v1/completions", json=body) as response:
            answer = await response.read()
            assert response.status == status
    if status == 400:
        error = json.loads(answer)["error"]
        assert error["param"] == "logprobs"
        assert "`stream`" in error["message"]
        assert engine.tokens_made == 0


async def test_a_chat_without_max_tokens_gets_as_many_as_a_whole_answer_may_hold(
    byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "MAX_WHOLE_LOGPROBS", 100)
    engine = FakeEngine(reply=lambda *_: "x" * 400)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        wish = {**CHAT, "logprobs": True, "top_logprobs": 9}
        async with session.post("/v1/chat/completions", json=wish) as response:
            answer = await response.json()
    assert answer["usage"]["completion_tokens"] == 10
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = Tokenizer(save_byte_tokenizer(tmp_path, chat_template=escape), threads=1, timeout_s=5.0)
    with pytest.raises(InvalidRequestError) as caught:
        await tokenizer.prompt_of_messages(HI, chat=ChatFormats(tokenizer, rows=VOCAB, eos_ids=()).base)
    assert caught.value.code == "chat_template_refused"
    tokenizer.close()


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Tokenizer(tmp_path, threads=1, timeout_s=1.0)


# --- starting, draining, dying --------------------------------------------------------------


def test_neither_torch_nor_transformers_is_imported_before_the_process_listens() -> None:
    program = "import sys, lorapool_runtime.__main__; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


async def test_while_the_base_loads_probes_and_metrics_answer_and_requests_get_503() -> None:
    async with listening(Runtime(settings_for_tests())) as url, aiohttp.ClientSession(url) as session:
        for path, status in (("/healthz", 200), ("/readyz", 503), ("/metrics", 200), ("/v1/runtime", 200)):
            async with session.get(path) as response:
                assert response.status == status, path
                if path == "/v1/runtime":
                    assert (await response.json())["ready"] is False
        async with session.post("/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "starting"
            assert int(response.headers["Retry-After"]) >= 1


async def test_credentials_that_arrive_while_the_base_loads_are_there_for_the_first_request(
    byte_tokenizer: Path,
) -> None:
    runtime, store = Runtime(settings_for_tests()), FakeStore()
    given = NamespaceCredentials(namespaces={"team": {"HF_TOKEN": "t"}})
    async with (
        listening(runtime) as url,
        aiohttp.ClientSession(url) as session,
        session.put(ROUTE_CREDENTIALS, data=given.model_dump_json()) as response,
    ):
        assert response.status == 204
    async with serving(byte_tokenizer, store=store, runtime=runtime):
        assert store.credentials == given


@asynccontextmanager
async def probed(runtime: Runtime, *, stuck_s: float = 30.0) -> AsyncIterator[str]:
    """The listener for probes and scrapers in its own thread, as the process runs it."""
    heartbeat, loop = Heartbeat(stuck_s), asyncio.get_running_loop()
    beating = asyncio.create_task(heartbeat.run())
    enter = functools.partial(probes, runtime, MetricsAccess(runtime.settings), heartbeat, loop, 0)
    try:
        async with in_own_thread(enter, "probes") as port:
            yield f"http://127.0.0.1:{port}"
    finally:
        beating.cancel()


def status_without_the_loop(url: str) -> int:
    """Asks while the calling thread, and with it the event loop, waits."""
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


async def test_probes_are_answered_while_the_event_loop_is_busy(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served, probed(served.runtime) as url:
        assert [status_without_the_loop(url + path) for path in ("/healthz", "/readyz")] == [200, 200]


async def test_probes_fail_once_the_event_loop_has_not_run_for_its_bound(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served, probed(served.runtime, stuck_s=0.2) as url:
        while status_without_the_loop(url + "/healthz") == 200:
            pass
        assert [status_without_the_loop(url + path) for path in ("/healthz", "/readyz")] == [503, 503]
        await asyncio.sleep(0)
        await until(lambda: status_without_the_loop(url + "/readyz") == 200)


async def test_draining_refuses_new_requests_and_finishes_the_running_ones(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 100, step_s=0.003)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        polling = asyncio.create_task(session.get("/v1/runtime", params={"after": "0", "wait": "0"}))
        seq = (await (await polling).json())["seq"]
        polling = asyncio.create_task(session.get("/v1/runtime", params={"after": str(seq + 1), "wait": "20"}))
        running = asyncio.create_task(session.post("/v1/chat/completions", json=CHAT))
        await until(lambda: engine.tokens_made > 2)
        draining = asyncio.create_task(served.runtime.drain(notice_s=0.0, grace_s=5.0))
        await until(lambda: served.runtime.draining)
        async with session.get("/readyz") as response:
            assert response.status == 503
        async with session.get("/healthz") as response:
            assert response.status == 200
        async with session.post("/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "draining"
            assert response.headers["Retry-After"] == "1"
        async with asyncio.timeout(1):
            await polling
        answer = await (await running).json()
        assert answer["choices"][0]["message"]["content"] == "x" * 100
        async with asyncio.timeout(1):
            await draining


async def test_a_request_that_does_not_finish_within_the_grace_period_ends_with_an_error_event_and_done(
    byte_tokenizer: Path,
) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.01)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        response = await session.post("/v1/chat/completions", json={**CHAT, "stream": True})
        await served.runtime.drain(notice_s=0.0, grace_s=0.05)
        text = (await response.read()).decode()
        *_, error, done = text.rstrip().split("\n\n")
        assert "shutting down" in error
        assert done == "data: [DONE]"
        await until(lambda: served.runtime.snapshot().in_flight == 0)


async def test_a_request_that_waits_for_a_load_at_the_end_of_the_grace_period_gets_503_draining(
    byte_tokenizer: Path,
) -> None:
    store = FakeStore(delay_s=30.0)
    async with serving(byte_tokenizer, store=store) as served, aiohttp.ClientSession(served.url) as session:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        waiting = asyncio.create_task(session.post("/v1/chat/completions", json={**CHAT, "model": "poet"}))
        await until(lambda: served.runtime.adapters.waiting == 1)
        await served.runtime.drain(notice_s=0.0, grace_s=0.05)
        response = await waiting
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "draining"


async def test_a_dead_engine_fails_open_requests_and_both_probes(byte_tokenizer: Path) -> None:
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.01)
    async with serving(byte_tokenizer, engine=engine) as served, aiohttp.ClientSession(served.url) as session:
        running = asyncio.create_task(session.post("/v1/chat/completions", json=CHAT))
        await until(lambda: engine.tokens_made > 2)
        engine.healthy = False
        async with asyncio.timeout(2):
            await served.runtime.sweep_forever()
        served.runtime.engine_died()
        assert (await running).status == 500
        for path in ("/healthz", "/readyz"):
            async with session.get(path) as response:
                assert response.status == 503
        assert served.runtime.snapshot().in_flight == 0


# --- metrics --------------------------------------------------------------------------------


async def scrape(served: Served) -> str:
    async with aiohttp.ClientSession(served.url) as session, session.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return await response.text()


async def used_once(served: Served, name: str) -> None:
    await served.runtime.adapters.register(key_of(name), descriptor(name))
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        await client.chat.completions.create(model=f"team/{name}", messages=HI)


async def test_each_adapter_is_counted_and_its_series_vanish_with_it(byte_tokenizer: Path) -> None:
    clock = FakeClock()
    async with serving(byte_tokenizer, clock=clock.clock(), base_label="team/tiny") as served:
        await used_once(served, "poet")
        clock.pass_s(30)
        text = await scrape(served)
        where = 'adapter="team/poet",base="team/tiny"'
        assert f'lorapool_runtime_adapter_requests_total{{{where},outcome="completed"}} 1.0' in text
        assert f"lorapool_runtime_adapter_completion_tokens_total{{{where}}} 11.0" in text
        assert f"lorapool_runtime_adapter_loads_total{{{where}}} 1.0" in text
        assert f"lorapool_runtime_adapter_resident{{{where}}} 1.0" in text
        assert f"lorapool_runtime_adapter_residency_seconds_total{{{where}}} 30.0" in text
        assert 'lorapool_runtime_load_seconds_count{base="team/tiny",tier="source"} 1.0' in text
        assert 'vllm:num_requests_running{model_name="team/tiny"} 0.0' in text
        assert 'vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""}' in text
        await served.runtime.adapters.delete(key_of("poet"))
        assert "team/poet" not in await scrape(served)


async def test_adapters_beyond_the_bound_share_one_label(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer, tracked_adapters=1) as served:
        for name in ("first", "second", "third"):
            await used_once(served, name)
        text = await scrape(served)
    assert 'adapter="team/first"' in text
    assert "team/second" not in text
    assert 'lorapool_runtime_adapter_requests_total{adapter="__other__",base="tiny",outcome="completed"} 2.0' in text


async def test_names_made_up_by_clients_never_become_labels(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served, aiohttp.ClientSession(served.url) as session:
        before = len((await scrape(served)).splitlines())
        for number in range(50):
            async with session.post("/v1/chat/completions", json={**CHAT, "model": f"invented-{number}"}) as response:
                assert response.status == 404
            async with session.post("/v1/chat/completions", json={**CHAT, f"made_up_{number}": 1}) as response:
                assert response.status == 400
        text = await scrape(served)
    assert "invented" not in text
    assert len(text.splitlines()) <= before + 2  # the two error codes


PROMTOOL = shutil.which("promtool") or (path if (path := "/tmp/warm/kbin/promtool") and Path(path).exists() else None)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
async def test_promtool_accepts_our_own_metrics(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served:
        await used_once(served, "poet")
        async with probed(served.runtime) as url, aiohttp.ClientSession(url) as session:
            async with session.get("/metrics") as response:
                own = await response.text()
            async with session.get("/metrics/vllm") as response:
                assert "vllm:num_requests_waiting" in await response.text()
    assert "lorapool_runtime_adapter_requests_total" in own
    assert "vllm:" not in own  # not our names to choose: they hold a colon
    assert PROMTOOL is not None
    done = await asyncio.to_thread(
        subprocess.run, [PROMTOOL, "check", "metrics"], input=own.encode(), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_series_begin_at_zero_before_the_first_request() -> None:
    text = Runtime(settings_for_tests(base_label="team/tiny")).metrics.render().decode()
    where = 'base="team/tiny"'
    for outcome in ("completed", "failed", "cancelled"):
        assert f'lorapool_runtime_requests_total{{{where},outcome="{outcome}"}} 0.0' in text
    for kind in ("prompt", "completion"):
        assert f'lorapool_runtime_tokens_total{{{where},type="{kind}"}} 0.0' in text
    assert f'lorapool_runtime_load_failures_total{{{where},reason="SourceTimeout"}} 0.0' in text
    assert f'lorapool_runtime_load_seconds_count{{{where},tier="source"}} 0.0' in text


async def test_the_series_of_an_adapter_begin_at_zero_when_it_is_registered(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer, base_label="team/tiny") as served:
        await served.runtime.adapters.register(key_of("poet"), descriptor("poet"))
        text = await scrape(served)
    where = 'adapter="team/poet",base="team/tiny"'
    for outcome in ("completed", "failed", "cancelled"):
        assert f'lorapool_runtime_adapter_requests_total{{{where},outcome="{outcome}"}} 0.0' in text
    for name in ("prompt_tokens", "completion_tokens", "loads"):
        assert f"lorapool_runtime_adapter_{name}_total{{{where}}} 0.0" in text


# --- settings -------------------------------------------------------------------------------


def test_without_a_token_only_loopback_is_served() -> None:
    assert read_settings(["--model", "x"], {}).host == "127.0.0.1"
    assert read_settings(["--model", "x"], {"LORAPOOL_TOKEN_SHA256": "a" * 64}).host == "0.0.0.0"
    with pytest.raises(SettingsError, match="LORAPOOL_TOKEN_SHA256"):
        read_settings(["--model", "x", "--listen-host", "0.0.0.0"], {})


def test_flags_win_over_the_environment_and_both_are_checked() -> None:
    environ = {"LORAPOOL_RUNTIME_MODEL": "hf://a/b", "LORAPOOL_RUNTIME_SLOTS": "3", "LORAPOOL_CACHE": "/elsewhere"}
    assert read_settings([], environ).slots == 3
    assert read_settings(["--slots", "5"], environ).slots == 5
    assert read_settings([], environ).base_name == "b"
    with pytest.raises(SettingsError, match="LORAPOOL_RUNTIME_SLOTS"):
        read_settings([], {**environ, "LORAPOOL_RUNTIME_SLOTS": "0"})
    with pytest.raises(SettingsError, match="unknown setting LORAPOOL_RUNTIME_SLOT "):
        read_settings([], {**environ, "LORAPOOL_RUNTIME_SLOT": "1"})
    with pytest.raises(SettingsError, match="--model"):
        read_settings([], {})


# --- the base's folder ------------------------------------------------------------------------


def progress() -> StartupProgress:
    return StartupProgress(time.monotonic)


def make_base(folder: Path) -> Path:
    """The files that make a folder a base, with next to nothing in them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    header = b'{"a.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


def test_a_base_on_a_volume_is_read_where_it_is_mounted(tmp_path: Path) -> None:
    make_base(tmp_path / "claim" / "models" / "tiny")
    settings = settings_for_tests(model="pvc://claim/models/tiny", pvc_root=tmp_path)
    found = base_folder(settings, SourceSettings(pvc_root=tmp_path), progress())
    assert found.path == tmp_path / "claim" / "models" / "tiny"
    assert found.digest is not None
    assert found.digest.startswith("sha256:")
    assert found.cached_bytes == 0


@pytest.mark.parametrize(
    ("model", "words"),
    [("/nowhere", "not a model folder"), ("ftp://x/y", "pvc://claim/path"), ("pvc://other/x", "other")],
)
def test_a_missing_base_is_refused_with_its_remedy(tmp_path: Path, model: str, words: str) -> None:
    with pytest.raises((BaseError, ArtifactError)) as caught:
        base_folder(settings_for_tests(model=model, pvc_root=tmp_path), SourceSettings(pvc_root=tmp_path), progress())
    assert words in reason_of(caught.value)


@pytest.mark.parametrize(("model", "called"), [("pvc://other/x", 1), ("/nowhere", 0)])
def test_work_during_a_fetch_is_done_once_and_is_over_when_the_fetch_is(
    tmp_path: Path, model: str, called: int
) -> None:
    calls: list[str] = []

    def meanwhile() -> None:
        time.sleep(0.2)
        calls.append(threading.current_thread().name)

    settings = settings_for_tests(model=model, pvc_root=tmp_path)
    with pytest.raises((BaseError, ArtifactError)):
        bring_up(settings, lambda *_: FakeEngine(), progress(), meanwhile=meanwhile)
    assert calls == ["during-fetch"] * called


def test_a_disk_cache_that_the_base_would_fill_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseFolder(make_base(tmp_path / "base"), None, (), cached_bytes=2**30)
    monkeypatch.setattr("lorapool_runtime.startup.base_folder", lambda *_: base)
    with pytest.raises(BaseError, match="raise cache_bytes"):
        bring_up(settings_for_tests(cache_bytes=2**30), lambda *_: FakeEngine(), progress())


async def test_the_state_shows_how_far_the_download_of_the_base_is() -> None:
    clock = FakeClock()
    runtime = Runtime(settings_for_tests(), clock=clock.clock())

    async def report(session: aiohttp.ClientSession) -> Any:
        async with session.get("/v1/runtime") as response:
            return (await response.json())["startup"]

    async with listening(runtime) as url, aiohttp.ClientSession(url) as session:
        assert await report(session) == {
            "phase": "fetching", "fetchedBytes": 0, "totalBytes": None, "bytesPerS": 0.0,
        }  # fmt: skip
        runtime.startup.begin_fetch(1000)
        runtime.startup.fetched(400)  # most of it by an earlier process
        for on_disk in (450, 500):
            clock.pass_s(2)
            runtime.startup.fetched(on_disk)
        assert await report(session) == {
            "phase": "fetching", "fetchedBytes": 500, "totalBytes": 1000, "bytesPerS": 25.0,
        }  # fmt: skip
        runtime.startup.begin_load()
        clock.pass_s(1)
        assert (await report(session))["phase"] == "loading"


async def test_a_long_poll_returns_while_the_base_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapool_runtime.serving.service.STARTUP_REPORT_S", 0.01)
    runtime = Runtime(settings_for_tests())
    reporting = asyncio.create_task(runtime.report_startup())
    async with listening(runtime) as url, aiohttp.ClientSession(url) as session:
        for _ in range(2):
            query = {"after": runtime.changes.seq, "wait": 20}
            async with asyncio.timeout(5), session.get("/v1/runtime", params=query) as response:
                assert (await response.json())["ready"] is False
    reporting.cancel()


async def test_a_served_base_reports_no_startup(byte_tokenizer: Path) -> None:
    async with serving(byte_tokenizer) as served:
        assert served.runtime.snapshot().startup is None

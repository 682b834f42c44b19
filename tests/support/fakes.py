"""A runtime that speaks the real protocol over a real socket, with faults that a test switches on.

Its text is deterministic and names the adapter and digest that answered, so a test sees whose weights were used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from lorapool_api.base_modules import BaseModules
from lorapool_api.common import BASE_TARGET, HEADER_ADAPTER, HEADER_COLD_START, HEADER_USAGE, AdapterKey
from lorapool_api.loraadapter import UsagePart
from lorapool_api.openai import (
    CODE_DRAINING,
    CODE_QUEUE_FULL,
    CODE_STARTING,
    ApiError,
    InvalidRequestError,
    NoFreeSlotError,
    RuntimeNotRegisteredError,
    TooManyRequestsError,
    UnauthenticatedError,
    UnavailableError,
)
from lorapool_api.protocol import (
    USAGE_COMMENT,
    AdapterDescriptor,
    AdapterReport,
    AdapterState,
    BaseReport,
    DeleteAnswer,
    PutAnswer,
    ResolveAnswer,
    RuntimeSnapshot,
    Tier,
    Usage,
    token_sha256,
)
from lorapool_api.trust.poll_proof import HEADER_PROOF, Challenge


def digest_of(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@dataclass
class Faults:
    """Faults from now on. A counter counts down each time its fault happens."""

    draining: bool = False
    queue_full: bool = False
    no_slot: bool = False
    die_before_head: int = 0
    """Reset this many connections after reading the request and before the response's head."""
    die_after_events: int | None = None
    """Reset the connection after this many data events of a stream."""
    die_mid_body: int = 0
    """Reset the connection in the middle of this many whole responses."""
    end_early: bool = False
    """End the stream properly but without [DONE]."""
    wrong_identity: str | None = None
    """Answer with this adapter header."""
    load_failure: ApiError | None = None


@dataclass
class Adapter:
    descriptor: AdapterDescriptor
    loaded: bool = False
    loads: int = 0


@dataclass
class Seen:
    """One inference request that arrived."""

    target: str
    body: dict[str, Any]
    headers: dict[str, str]
    completion_tokens: int = 0
    cancelled: bool = False


@dataclass
class FakeRuntime:
    token: str = "t" * 64
    pod_uid: str | None = None
    """The pod that this runtime proves to be; None: each one that it is polled as, as a test rarely knows the uid."""
    served_name: str = "tiny"
    token_s: float = 0.0
    load_s: float = 0.0
    words: int = 6
    """Completion tokens of every answer."""
    sends_events: bool = True
    """False: answers whole requests with JSON alone, as an earlier version did."""
    filler: str = "w"
    """Prefix of the words after the identity and the prompt; a long one fills socket buffers quickly."""
    ready: bool = True
    boot_id: str = "boot-1"
    slots: int = 4
    faults: Faults = field(default_factory=Faults)
    adapters: dict[AdapterKey, Adapter] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    puts: list[AdapterKey] = field(default_factory=list)
    polls: int = 0
    credentials: dict[str, dict[str, str]] = field(default_factory=dict)
    """The namespaces' own, as the operator delivered them last."""
    authorizations: list[str] = field(default_factory=list)
    """The credentials of all requests, in order."""
    modules: BaseModules | None = None
    modules_asked: list[int] = field(default_factory=list)
    """The statuses of the answers to the question for them."""
    modules_status: int = 404
    """Of the answer while there are none."""
    """What it reports of its base; None: it has no such route, as an earlier version."""
    resolve_answer: ResolveAnswer = field(default_factory=ResolveAnswer)
    port: int = 0
    tls: ssl.SSLContext | None = None
    """Serves HTTPS with it."""
    _runner: web.AppRunner | None = None
    _killed: bool = False
    _seq: int = 1
    _in_flight: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _loading: dict[AdapterKey, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    # --- for tests

    def change(self) -> None:
        """Announces a change of the snapshot: wakes the long-polls."""
        self._seq += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def have(self, key: AdapterKey, display: str) -> None:
        """Registers an adapter as loaded."""
        descriptor = AdapterDescriptor.model_validate({"display": display, "source": {"uri": "hf://org/given"}})
        self.adapters[key] = Adapter(descriptor, loaded=True, loads=1)
        if (task := self._loading.pop(key, None)) is not None:
            task.cancel()
        self.change()

    async def kill(self) -> None:
        """Acts as on SIGKILL: stops listening and resets every connection.

        asyncio may have accepted a connection that the server does not know yet: its requests are reset as they come.
        """
        assert self._runner is not None
        self._killed = True
        for site in list(self._runner.sites):
            await site.stop()
        for connection in self._runner.server.connections if self._runner.server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()

    def snapshot(self) -> RuntimeSnapshot:
        loaded = [item for item in self.adapters.values() if item.loaded]
        return RuntimeSnapshot(
            seq=self._seq,
            boot_id=self.boot_id,
            started_unix_s=1.0,
            base=BaseReport(served_name=self.served_name, max_model_len=512, dtype="float32"),
            ready=self.ready,
            draining=self.faults.draining,
            slots_total=self.slots,
            slots_used=len(loaded),
            max_rank=16,
            in_flight=self._in_flight,
            adapters=[self._report(key, adapter) for key, adapter in self.adapters.items()],
        )

    @asynccontextmanager
    async def running(self, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[FakeRuntime]:
        runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        self._runner = runner
        await runner.setup()
        site = web.TCPSite(runner, host, port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.port = int(runner.addresses[0][1])
        try:
            yield self
        finally:
            await runner.cleanup()
            for task in self._loading.values():
                task.cancel()

    # --- the protocol

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._outermost], client_max_size=8 * 2**20)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._health)
        app.router.add_get("/v1/runtime", self._runtime)
        app.router.add_get("/v1/base/modules", self._modules)
        app.router.add_put("/v1/adapters/{uid}/{digest}", self._put)
        app.router.add_delete("/v1/adapters/{uid}/{digest}", self._delete)
        app.router.add_post("/v1/resolve", self._resolve)
        app.router.add_put("/v1/credentials", self._credentials)
        app.router.add_post("/v1/chat/completions", self._infer)
        app.router.add_post("/v1/completions", self._infer)
        return app

    @web.middleware
    async def _outermost(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self._killed:
            await _cut(request)
        try:
            if request.path not in ("/healthz", "/readyz"):
                authorization = request.headers.get("Authorization", "")
                self.authorizations.append(authorization)
                sent = token_sha256(authorization.removeprefix("Bearer "))
                if sent != token_sha256(self.token) and self._challenge(request) is None:
                    raise UnauthenticatedError("wrong token")
            answer: web.StreamResponse = await handler(request)
            return answer
        except ApiError as error:
            return web.json_response(error.body(), status=error.status, headers=error.headers())

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 503)

    async def _runtime(self, request: web.Request) -> web.Response:
        self.polls += 1
        after, wait_s = int(request.query.get("after", -1)), float(request.query.get("wait", 0))
        if self._seq <= after and wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        body, challenge = json.dumps(self.snapshot().dump()).encode(), self._challenge(request)
        proof = challenge.answer(token_sha256(self.token), body) if challenge is not None else ""
        return web.Response(body=body, content_type="application/json", headers={HEADER_PROOF: proof})

    async def _modules(self, _: web.Request) -> web.Response:
        self.modules_asked.append(self.modules_status if self.modules is None else 200)
        if self.modules is None:
            return web.Response(status=self.modules_status)
        return web.json_response(self.modules.dump())

    def _challenge(self, request: web.Request) -> Challenge | None:
        """The challenge of a poll that means this pod and comes from a poller that knows the token."""
        challenge = Challenge.parse(request.headers.get("Authorization", ""))
        if challenge is None or request.path != "/v1/runtime" or not challenge.is_from(token_sha256(self.token)):
            return None
        return challenge if self.pod_uid in (None, challenge.pod_uid) else None

    async def _put(self, request: web.Request) -> web.Response:
        key = AdapterKey(request.match_info["uid"], request.match_info["digest"])
        descriptor = AdapterDescriptor.model_validate(await request.json())
        self.puts.append(key)
        if key not in self.adapters:
            self.adapters[key] = Adapter(descriptor)
        else:
            self.adapters[key].descriptor = descriptor
        if descriptor.load:
            await self._load(key)
        self.change()
        answer = PutAnswer(boot_id=self.boot_id, adapter=self._report(key, self.adapters[key]))
        return web.json_response(answer.dump())

    async def _delete(self, request: web.Request) -> web.Response:
        self.adapters.pop(AdapterKey(request.match_info["uid"], request.match_info["digest"]), None)
        self.change()
        usage = UsagePart(boot_id=self.boot_id)
        answer = DeleteAnswer(boot_id=self.boot_id, freed_device_bytes=0, freed_host_bytes=0, usage=usage)
        return web.json_response(answer.dump())

    async def _credentials(self, request: web.Request) -> web.Response:
        self.credentials = (await request.json())["namespaces"]
        return web.Response(status=204)

    async def _resolve(self, _: web.Request) -> web.Response:
        return web.json_response(self.resolve_answer.dump())

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        target = request.headers.get(HEADER_ADAPTER, "")
        seen = Seen(target=target, body=body, headers={k.lower(): v for k, v in request.headers.items()})
        self.seen.append(seen)
        if self.faults.die_before_head > 0:
            self.faults.die_before_head -= 1
            await _cut(request)
        if self.faults.draining:
            raise UnavailableError("shutting down", code=CODE_DRAINING)
        if not self.ready:
            raise UnavailableError("still loading", code=CODE_STARTING)
        if self.faults.queue_full:
            raise TooManyRequestsError("the queue is full", code=CODE_QUEUE_FULL, retry_after_s=1)
        if body.get("temperature", 0) < 0:
            raise InvalidRequestError("`temperature` must not be below 0.", param="temperature", code="invalid_value")
        self._in_flight += 1
        try:
            identity, cold_ms = BASE_TARGET, 0
            if target != BASE_TARGET:
                key = AdapterKey.parse(target)
                adapter = self.adapters.get(key)
                if adapter is None:
                    raise RuntimeNotRegisteredError(f"{target} is not registered here")
                identity = f"{adapter.descriptor.display}@{key.digest}"
                cold_ms = await self._load(key)
            return await self._answer(request, seen, body, identity, cold_ms)
        except asyncio.CancelledError:
            seen.cancelled = True
            raise
        finally:
            self._in_flight -= 1

    async def _load(self, key: AdapterKey) -> int:
        """Waits for the load, which all waiting requests share; returns this request's waiting time in milliseconds."""
        adapter = self.adapters[key]
        if adapter.loaded:
            return 0
        if self.faults.no_slot:
            raise NoFreeSlotError("every slot is in use")
        if self.faults.load_failure is not None:
            raise self.faults.load_failure
        began_s = time.monotonic()
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load_once(key, adapter))
            self.change()
        await asyncio.shield(self._loading[key])  # a client that leaves does not end it for the others
        return max(1, round((time.monotonic() - began_s) * 1000))

    async def _load_once(self, key: AdapterKey, adapter: Adapter) -> None:
        await asyncio.sleep(self.load_s)
        adapter.loaded = True
        adapter.loads += 1
        self._loading.pop(key, None)
        self.change()

    async def _answer(
        self, request: web.Request, seen: Seen, body: dict[str, Any], identity: str, cold_ms: int
    ) -> web.StreamResponse:
        prompt = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
        words = f"{identity} heard {prompt}".split()
        words = (words + [f"{self.filler}{number}" for number in range(self.words)])[: self.words]
        prompt_tokens = len(prompt.split())
        headers = {HEADER_ADAPTER: self.faults.wrong_identity or identity}
        if cold_ms:
            headers[HEADER_COLD_START] = str(cold_ms)
        if not body.get("stream") and not (self.sends_events and request.headers.get("Accept") == "text/event-stream"):
            await asyncio.sleep(self.token_s * self.words)
            seen.completion_tokens = len(words)
            headers[HEADER_USAGE] = Usage(prompt_tokens=prompt_tokens, completion_tokens=len(words)).model_dump_json()
            return web.json_response(_whole(body, words, prompt_tokens), headers=headers)
        out = web.StreamResponse(headers=headers)
        out.content_type = "text/event-stream"
        await out.prepare(request)
        for number, word in enumerate(words, start=1):
            await asyncio.sleep(self.token_s)
            if self.faults.die_after_events is not None and number > self.faults.die_after_events:
                await _cut(request)
            seen.completion_tokens = number
            comment = _comment(prompt_tokens, number)
            event = _event(body, word if number == 1 else f" {word}", None) if body.get("stream") else b"\n"
            await out.write(comment + event)
        if not body.get("stream"):
            return await self._end_whole(request, out, _whole(body, words, prompt_tokens))
        if not self.faults.end_early:
            await out.write(_comment(prompt_tokens, len(words)) + _event(body, "", "stop"))
            if (body.get("stream_options") or {}).get("include_usage"):
                await out.write(_usage_event(body, prompt_tokens, len(words)))
            await out.write(b"data: [DONE]\n\n")
        await out.write_eof()
        return out

    async def _end_whole(
        self, request: web.Request, out: web.StreamResponse, answer: dict[str, Any]
    ) -> web.StreamResponse:
        event = b"data: " + json.dumps(answer).encode() + b"\n\n"
        if self.faults.die_mid_body > 0:
            self.faults.die_mid_body -= 1
            await out.write(event[: len(event) // 2])
            await _cut(request)
        await out.write_eof(event)
        return out

    def _report(self, key: AdapterKey, adapter: Adapter) -> AdapterReport:
        state = AdapterState.LOADED if adapter.loaded else AdapterState.REGISTERED
        return AdapterReport(
            uid=key.uid,
            digest=key.digest,
            display=adapter.descriptor.display,
            state=AdapterState.LOADING if key in self._loading else state,
            tier=Tier.DEVICE if adapter.loaded else Tier.SOURCE,
            since_unix_s=1.0,
            usage=UsagePart(boot_id=self.boot_id),
        )


def _whole(body: dict[str, Any], words: list[str], prompt_tokens: int) -> dict[str, Any]:
    chat, text = "messages" in body, " ".join(words)
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "cmpl-1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, **choice}],
        "usage": _usage(prompt_tokens, len(words)),
    }


async def _cut(request: web.Request) -> None:
    """Resets the connection, as when the process dies."""
    if request.transport is not None:
        request.transport.abort()
    await asyncio.sleep(3600)


def _comment(prompt_tokens: int, completion_tokens: int) -> bytes:
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    return USAGE_COMMENT + usage.model_dump_json().encode() + b"\n"


def _event(body: dict[str, Any], text: str, finish: str | None) -> bytes:
    part: dict[str, Any] = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return _data(body, [{"index": 0, "finish_reason": finish, "logprobs": None, **part}], None)


def _usage_event(body: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> bytes:
    return _data(body, [], _usage(prompt_tokens, completion_tokens))


def _data(body: dict[str, Any], choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
    kind = "chat.completion.chunk" if "messages" in body else "text_completion"
    chunk = {
        "id": "cmpl-1", "object": kind, "created": 1, "model": body["model"], "choices": choices, "usage": usage,
    }  # fmt: skip
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class FailsLate(FakeRuntime):
    """Admits a whole request and reports a failure where its answer should be."""

    async def _end_whole(self, request: Any, out: Any, answer: Any) -> Any:
        error = {"error": {"message": "The engine failed.", "type": "server_error", "param": None, "code": None}}
        await out.write_eof(b"data: " + json.dumps(error).encode() + b"\n\n")
        return out

"""`litellm`: its providers for OpenAI's API, its bridges from the responses and Anthropic's API, and its proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
import openai
from check import BASE, KEY, MODEL, check, raises
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True
litellm.telemetry = False
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
COMMON: dict[str, Any] = {"api_base": BASE, "api_key": KEY, "num_retries": 0, "timeout": 60, "temperature": 0}
IMAGE: list[Any] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
]
PROXY_START_S = 120
PROXY_KEY = "sk-lorapool-0123456789abcdef0123456789abcdef"
"""The proxy does not start without a key of its own."""
WEATHER: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 10}}, "required": ["city"]}}}]  # fmt: skip


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


def complete(provider: str, messages: list[Any] = HELLO, max_tokens: int = 24, **more: Any) -> Any:
    return litellm.completion(model=f"{provider}/{MODEL}", messages=messages, max_tokens=max_tokens, **COMMON, **more)


def streamed_usage(provider: str) -> bool:
    chunks = list(complete(provider, stream=True, stream_options={"include_usage": True}))
    return chunks[-1].usage.completion_tokens > 0


def tool_loop(provider: str, stream: bool) -> bool:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = complete(provider, max_tokens=200, tools=WEATHER, tool_choice=choice, stream=stream)
    message = (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0].message
    [call] = message.tool_calls
    json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "sunny"}
    return bool(complete(provider, [*HELLO, message.model_dump(), result], tools=WEATHER, tool_choice="none"))


def anthropic(provider: str) -> bool:
    made = litellm.anthropic.messages.acreate(
        model=f"{provider}/{MODEL}", messages=HELLO, max_tokens=10, api_base=BASE, api_key=KEY
    )
    return bool(asyncio.run(made))


@contextlib.contextmanager
def proxy() -> Iterator[str]:
    """LiteLLM's proxy in front of the gateway; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_list": [{"model_name": "tiny", "litellm_params": {
            "model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY}}]}  # fmt: skip
        (Path(folder) / "config.yaml").write_text(json.dumps(config))
        program = [str(Path(sys.executable).with_name("litellm")), "--config", f"{folder}/config.yaml"]
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*program, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, "LITELLM_MASTER_KEY": PROXY_KEY},
                stdout=out,
                stderr=out,
            )
        try:
            _wait(f"http://127.0.0.1:{port}/health/liveliness", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + PROXY_START_S
    while time.monotonic() < ends and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise TimeoutError(f"the proxy did not start: {log.read_text(errors='replace')[-2000:]}")


def messages_by_proxy(url: str) -> bool:
    body = json.dumps({"model": "tiny", "max_tokens": 10, "messages": HELLO}).encode()
    headers = {"content-type": "application/json", "x-api-key": PROXY_KEY, "anthropic-version": "2023-06-01"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/messages", body, headers), timeout=60) as answer:
        return json.load(answer)["type"] == "message"


def check_provider(provider: str) -> None:
    check(f"{provider}: chat", lambda: complete(provider).usage.completion_tokens > 0)
    check(f"{provider}: stream with usage", lambda: streamed_usage(provider))
    check(f"{provider}: tool loop", lambda: tool_loop(provider, stream=False))
    check(f"{provider}: streamed tool loop", lambda: tool_loop(provider, stream=True))


for name in ("openai", "hosted_vllm", "litellm_proxy"):
    check_provider(name)
check("completions", lambda: litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="Once", max_tokens=8, **COMMON))  # fmt: skip
check("user and metadata", lambda: complete("openai", user="u", metadata={"a": "b"}))
check("response format of a pydantic model", lambda: Person.model_validate_json(
    complete("openai", max_tokens=200, response_format=Person).choices[0].message.content))  # fmt: skip
check("responses", lambda: litellm.responses(
    model=f"openai/{MODEL}", input="hi", api_base=BASE, api_key=KEY, max_output_tokens=16).output)  # fmt: skip
check("responses over chat", lambda: litellm.responses(
    model=f"hosted_vllm/{MODEL}", input="hi", api_base=BASE, api_key=KEY, max_output_tokens=16).output)  # fmt: skip
check("Anthropic's messages over chat", lambda: anthropic("hosted_vllm"))
check("an image is a 400", lambda: raises(litellm.BadRequestError, lambda: complete("openai", IMAGE)))
check("embeddings are refused", lambda: raises(openai.APIStatusError, lambda: litellm.embedding(
    model=f"openai/{MODEL}", input=["x"], api_base=BASE, api_key=KEY)))  # fmt: skip
with proxy() as url:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=PROXY_KEY, max_retries=0)
    check("proxy: chat", lambda: client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8).usage)
    check("proxy: stream", lambda: len(list(client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, stream=True))) > 2)  # fmt: skip
    check("proxy: responses", lambda: client.responses.create(model="tiny", input="hi", max_output_tokens=16).output)
    check("proxy: Anthropic's messages", lambda: messages_by_proxy(url))

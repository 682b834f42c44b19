"""Unmodified lm-eval gives the real base the score of transformers (a fine-tune's: tests/e2e), schemas and tools."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from lm_eval_kit import ROUTING, assert_equal, harness, real_base, score_by_harness, score_directly
from runtime_process import TOKEN, RuntimeProcess, runtime_process

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuntimeProcess]:
    base, folder = real_base(), tmp_path_factory.mktemp("process")
    shutil.copytree(ROUTING, folder / "pvc" / "tunes" / "routing")
    with runtime_process(folder, base, pvc_root=folder / "pvc", kv_bytes=256 * 2**20) as running:
        source = {"uri": "pvc://tunes/routing"}
        digest = call(running, "POST", "/v1/resolve", {"source": source})["digest"]
        call(
            running, "PUT", f"/v1/adapters/uid-1/{digest}",
            {"display": "team/routing", "names": ["routing"], "source": source},
        )  # fmt: skip
        yield running


def call(process: RuntimeProcess, method: str, path: str, body: Any) -> Any:
    asked = urllib.request.Request(process.url + path, json.dumps(body).encode(), method=method)
    asked.add_header("Authorization", f"Bearer {TOKEN}")
    asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.deep  # every run of the tests has one run of lm-eval, on a fine-tune: tests/e2e
def test_the_score_is_the_one_that_transformers_gives(process: RuntimeProcess, tmp_path: Path) -> None:
    harness()
    found = score_by_harness(f"{process.url}/v1", TOKEN, "tiny", real_base(), tmp_path)
    assert_equal(found, score_directly(real_base(), None))


def test_the_real_base_follows_schemas_and_calls_tools(process: RuntimeProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key=TOKEN, max_retries=0) as client:
        for model in ("tiny", "routing"):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Is Rome warm?"}], temperature=0, max_tokens=60,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            )  # fmt: skip
            assert answer.choices[0].finish_reason == "stop"
            assert json.loads(answer.choices[0].message.content or "").keys() == {"city", "warm"}
            called = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "What is the weather in Rome?"}], temperature=0,
                tools=[{"type": "function", "function": {"name": "get_weather", "parameters": schema}}],
                tool_choice="required", parallel_tool_calls=False, max_tokens=60,
            )  # fmt: skip
            assert called.choices[0].finish_reason == "tool_calls"
            (one,) = called.choices[0].message.tool_calls or ()
            assert one.function.name == "get_weather"
            assert json.loads(one.function.arguments).keys() == {"city", "warm"}

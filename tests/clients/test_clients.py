"""The unmodified clients of other projects, against the gateway in front of a runtime with the real engine.

Each script makes many checks and prints a line of JSON for each. `make clients` installs the clients and runs all of
them; what works is listed in docs/reference/clients.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_kit import tiny_model
from fakes_runtime import save_byte_tokenizer
from gateway_world import KEY, world
from runtime_process import TOKEN, runtime_process
from store_kit import running_store
from tuning_world import tuning_world

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
MODULES = FOLDER / "node_modules"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
GUIDELLM = ROOT / ".venv-guidellm" / "bin" / "guidellm"
PAGE = ROOT / "docs" / "reference" / "clients.md"
TIMEOUT_S = 900


@dataclass(frozen=True)
class Place:
    url: str
    base: Path
    """The folder of the base, which has its tokenizer."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    base = tmp_path_factory.mktemp("base")
    tiny_model("Llama", eos_token_id=257, max_position_embeddings=4096).save_pretrained(base)
    save_byte_tokenizer(base)
    with runtime_process(tmp_path_factory.mktemp("process"), base, kv_bytes=32 * 2**20) as runtime:
        ready, over, urls = threading.Event(), threading.Event(), list[str]()

        async def serve() -> None:
            async with world() as here:
                here.tokens = (TOKEN,)
                here.base()
                here.replica(runtime.url, state=None)
                urls.append(here.url)
                ready.set()
                await asyncio.to_thread(over.wait)

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        assert ready.wait(30)
        yield Place(urls[0], base)
        over.set()
        thread.join(30)


def environ(place: Place) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return {**kept, "LP_BASE": f"{place.url}/v1", "LP_KEY": KEY, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}


def run(command: list[str], place: Place) -> str:
    done = subprocess.run(
        command, cwd=FOLDER, env=environ(place), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def assert_checks(output: str, at_least: int) -> None:
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"name"')]
    assert [one for one in found if not one["ok"]] == []
    assert len(found) >= at_least


def node(script: str, place: Place, at_least: int) -> None:
    program = shutil.which("node")
    if program is None or not MODULES.is_dir():
        pytest.skip("no node or no node_modules: `make clients` installs them")
    assert_checks(run([program, script], place), at_least)


def python(script: str, place: Place, at_least: int) -> None:
    if not PYTHON.is_file():
        pytest.skip(f"no {PYTHON}: `make clients` installs it")
    assert_checks(run([str(PYTHON), script], place), at_least)


def test_openai_npm(place: Place) -> None:
    node("openai_npm.mjs", place, 16)


async def test_openai_npm_with_files_and_fine_tuning_jobs(tmp_path: Path) -> None:
    with running_store(tmp_path / "store") as store:
        async with tuning_world(store) as here:
            await asyncio.to_thread(node, "openai_tuning.mjs", Place(here.world.url, tmp_path), 8)


@pytest.mark.deep
def test_vercels_ai_sdk_with_every_type_of_zod(place: Place) -> None:
    node("ai_sdk.mjs", place, 115)


@pytest.mark.deep
def test_langchain(place: Place) -> None:
    python("langchain_client.py", place, 35)


@pytest.mark.deep
def test_litellm_and_its_proxy(place: Place) -> None:
    python("litellm_client.py", place, 24)


@pytest.mark.deep
def test_instructor(place: Place) -> None:
    python("instructor_client.py", place, 12)


@pytest.mark.deep
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(place: Place, path: str, tmp_path: Path) -> None:
    if not GUIDELLM.is_file():
        pytest.skip(f"no {GUIDELLM}: `make clients` installs it")
    backend = f"kind=openai_http,target={place.url},api_key={KEY},model=demo/tiny,request_format={path}"
    run(
        [
            str(GUIDELLM), "run", "--backend", backend, "--profile", "kind=synchronous",
            "--constraint", "kind=max_requests,count=4", "--tokenizer", f"kind=hf_auto,model={place.base}",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
            "--output", f"kind=json,path={tmp_path / 'out.json'}", "--disable-console-interactive",
        ],
        place,
    )  # fmt: skip
    report = json.loads((tmp_path / "out.json").read_text())
    [benchmark] = report["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 4
    assert {request["output_tokens"] for request in benchmark["requests"]["successful"]} == {8}


def test_the_page_names_the_versions_that_are_tested() -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==([0-9.]+)", "\n".join(
        (ROOT / "tests" / lock).read_text() for lock in ("clients/requirements.lock", "clients/guidellm.lock",
                                                         "lm_eval/requirements.lock")), re.M))  # fmt: skip
    npm = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    rows = re.findall(r"^\| `([^`]+)` \| ([0-9.]+) ", PAGE.read_text(), re.M)
    assert rows
    for name, version in rows:
        assert version in (locked.get(name), npm.get(name)), name

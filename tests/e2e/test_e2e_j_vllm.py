"""The demo's fine-tunes on the engine vllm, in its build for CPUs: the answers, counts, states and ends are torch's.

Both engines compute in float32, where greedy answers are the same. The base has no replica between the tests; each
start takes a minute or more.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e_world import ROOT, World, upgraded
from openai import OpenAI

pytestmark = pytest.mark.deep

BASE = "smollm2-vllm"
START_S = 900.0
PROFILE = {
    "engine": "vllm",
    "threads": 2,
    "shmSizeLimit": "1Gi",
    "resources": {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "7Gi"}},
    "env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"}],
}


def name_of(task: str) -> str:
    return f"vllm-{task}"


@pytest.fixture(scope="module")
def vllm(world: World) -> Iterator[World]:
    """The same base once more, on a profile with vLLM, with the same five fine-tunes."""
    build = [sys.executable, str(ROOT / "hack" / "images"), "build", "--only", "runtime-vllm"]
    build += ["--registry", world.summary["registry"], "--tag", "e2e"]
    subprocess.run(build, check=True, timeout=2400)
    base = world.get("bm", "smollm2")
    spec = base["spec"] | {"runtimeProfile": "vllm", "servedName": BASE, "fineTuning": {"enabled": False}}
    spec |= {"scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "10m"}}
    spec |= {"coldStart": {"maxWait": "15m", "maxQueued": 256}, "lora": {"maxRank": 16, "slots": 5}}
    spec.pop("replicas", None)
    made = [{"apiVersion": base["apiVersion"], "kind": "BaseModel", "metadata": {"name": BASE}, "spec": spec}]
    for task in world.tasks:
        own = world.get("lora", task)
        wanted = {"baseModelRef": {"name": BASE}, "source": own["spec"]["source"], "idleAfter": "10m"}
        made.append({**own, "metadata": {"name": name_of(task)}, "spec": wanted, "status": None})
    made = [{key: value for key, value in item.items() if key != "status"} for item in made]
    with upgraded(world, "image.runtimeVllm.tag=e2e", values={"runtimeProfiles": {"vllm": PROFILE}}):
        world.apply(*made)
        yield world
        world.kubectl("delete", "bm", BASE, "--wait=true", timeout_s=300)
        world.kubectl("delete", "lora", *map(name_of, world.tasks))


@pytest.fixture
def client(vllm: World) -> Iterator[OpenAI]:
    with vllm.client(timeout=START_S) as made:
        yield made


def pods(world: World) -> list[dict[str, Any]]:
    return list(world.get("pods", "-l", f"lorapool.dev/base={BASE}")["items"])


def asked(world: World, client: OpenAI, task: str) -> tuple[str, str, int, int]:
    """(answer, digest in the header, prompt tokens, completion tokens)."""
    question = {**world.question(task), "model": world.model(name_of(task))}
    raw = client.chat.completions.with_raw_response.create(**question)
    reply, header = raw.parse(), raw.headers["x-lorapool-adapter"]
    assert header.startswith(f"{world.namespace}/{name_of(task)}@")
    assert reply.usage is not None
    text = (reply.choices[0].message.content or "").strip()
    return text, header.partition("@")[2], reply.usage.prompt_tokens, reply.usage.completion_tokens


def wanted(world: World, task: str) -> tuple[str, str, int, int]:
    """The same of the torch engine."""
    [known] = [item for item in world.summary["answers"] if item["task"] == task]
    return known["answer"], known["header"].partition("@")[2], known["prompt_tokens"], known["completion_tokens"]


def test_the_five_fine_tunes_answer_as_on_the_torch_engine(vllm: World, client: OpenAI) -> None:
    started = time.monotonic()
    assert asked(vllm, client, vllm.tasks[0]) == wanted(vllm, vllm.tasks[0])
    print(f"the first answer, with the start of the base, took {time.monotonic() - started:.0f} s")
    with ThreadPoolExecutor(len(vllm.tasks)) as threads:  # all five in one batch
        found = list(threads.map(lambda task: asked(vllm, client, task), vllm.tasks))
    assert found == [wanted(vllm, task) for task in vllm.tasks]
    assert vllm.condition("bm", BASE, "Ready") == ("True", "Ready")
    for task in vllm.tasks:
        name = name_of(task)
        vllm.wait("Loaded", lambda one=name: vllm.condition("lora", one, "Loaded")[0] == "True", timeout_s=30)
        status = vllm.get("lora", name)["status"]
        assert [(item["tier"], item["digest"]) for item in status["replicas"]] == [("device", wanted(vllm, task)[1])]

    def counted() -> object:
        one = vllm.get("lora", name_of(vllm.tasks[0]))["status"].get("usage") or {}
        tokens = (int(one.get("promptTokens", 0)), int(one.get("completionTokens", 0)))
        _, _, prompt, completion = wanted(vllm, vllm.tasks[0])
        return tokens == (2 * prompt, 2 * completion) or tokens

    vllm.wait("usage", counted, timeout_s=60)


def test_an_idle_adapter_is_parked_and_the_idle_base_goes_to_zero_and_back(vllm: World, client: OpenAI) -> None:
    task = vllm.tasks[1]
    name = name_of(task)
    vllm.patch("lora", name, {"idleAfter": "8s"})
    assert asked(vllm, client, task) == wanted(vllm, task)
    vllm.wait("Parked", lambda: vllm.condition("lora", name, "Loaded") == ("False", "Parked"), timeout_s=60)
    assert vllm.condition("lora", name, "Ready")[0] == "True"
    assert asked(vllm, client, task) == wanted(vllm, task)  # loaded again
    vllm.patch("bm", BASE, {"scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "10s"}})
    vllm.wait("zero pods", lambda: not pods(vllm) or "pods", timeout_s=180)
    assert vllm.condition("bm", BASE, "Ready") == ("True", "ScaledToZero")
    vllm.patch("bm", BASE, {"scaling": {"minReplicas": 0, "maxReplicas": 1, "idleAfter": "30m"}})
    assert asked(vllm, client, task) == wanted(vllm, task)  # held until the base has started
    assert len(pods(vllm)) == 1


def test_a_deleted_pod_answers_what_it_has_and_a_killed_one_costs_no_wrong_answer(vllm: World, client: OpenAI) -> None:
    task = vllm.tasks[2]
    before = wanted(vllm, task)
    assert asked(vllm, client, task) == before
    question = {**vllm.question(task), "model": vllm.model(name_of(task)), "max_tokens": 200}
    stream = client.chat.completions.create(**question, stream=True, extra_body={"ignore_eos": True})
    chunks = [next(stream)]
    [pod] = pods(vllm)
    vllm.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert asked(vllm, client, task) == before  # by the pod that replaces it
    [pod] = [item for item in pods(vllm) if "deletionTimestamp" not in item["metadata"]]
    vllm.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
    vllm.wait("not loaded", lambda: vllm.condition("lora", name_of(task), "Loaded")[0] != "True", timeout_s=30)
    assert asked(vllm, client, task) == before
    assert vllm.condition("bm", BASE, "Ready")[0] == "True"

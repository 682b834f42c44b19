"""Long tests of fine-tuning on the real cluster: five examples side by side, and a job that is interrupted often."""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from e2e_tuning import Line, Tuning, lines_of
from e2e_world import BASE, ROOT, Prober, World
from openai.types.fine_tuning import FineTuningJob

sys.path.append(str(ROOT / "hack" / "models"))

from finetune_metrics import SCORERS  # found through the line above
from finetune_tasks import SCORES, TASKS, Task

pytestmark = pytest.mark.deep
MARGIN = 0.1
"""Other weights than those of the committed scores: a few of some sixty answers may turn out otherwise."""
TRAINED_S = 3600.0


def test_the_five_examples_train_side_by_side_and_score_as_the_committed_ones(world: World, tuning: Tuning) -> None:
    described = yaml.safe_load_all((ROOT / "examples" / "finetunes" / "jobs.yaml").read_text())
    jobs = {item["metadata"]["name"]: create(tuning, item["metadata"]["name"], item["spec"]) for item in described}
    assert set(jobs) == set(TASKS)
    world.wait(
        "all five in training",
        lambda: all(tuning.status(job).get("progress", {}).get("step") for job in jobs.values()),
        timeout_s=TRAINED_S,
    )
    [pod] = tuning.trainer_pods()
    assert {tuning.status(job)["trainer"]["pod"] for job in jobs.values()} == {pod["metadata"]["name"]}
    ended = {name: tuning.ended(job, TRAINED_S) for name, job in jobs.items()}
    assert {job.status for job in ended.values()} == {"succeeded"}
    assert [each["metadata"]["uid"] for each in tuning.trainer_pods()] == [pod["metadata"]["uid"]]
    for job in ended.values():
        losses = tuning.validation_losses(job)  # from the events that the client reads
        assert losses[max(losses)] < losses[0]
    found = {name: score(tuning, TASKS[name], str(job.fine_tuned_model)) for name, job in ended.items()}
    committed = json_scores()
    print({name: (round(found[name], 3), committed[name]) for name in found})
    assert [name for name in found if found[name] < committed[name] - MARGIN] == []


def create(tuning: Tuning, name: str, spec: dict[str, Any]) -> FineTuningJob:
    """The committed job, as the client makes it."""
    training, lora = spec["training"], spec["lora"]
    return tuning.client.fine_tuning.jobs.create(
        model=tuning.base,
        training_file=tuning.upload(lines_of(name, "train")),
        validation_file=tuning.upload(
            [{"messages": line["messages"]} for line in lines_of(name, "heldout", every=4)]  # without what is scored
        ),
        suffix=name,
        seed=training["seed"],
        hyperparameters={"n_epochs": training["epochs"], "batch_size": 8},
        extra_body={
            "lorapool": {
                "rank": lora["rank"],
                "learning_rate": training["learningRate"],
                **({"target_modules": lora["targetModules"]} if "targetModules" in lora else {}),
            }
        },
    )


def json_scores() -> dict[str, float]:
    """The committed score of each example by its own measure."""

    return {
        name: float(task["finetune"][task["measure"]]) for name, task in json.loads(SCORES.read_text())["tasks"].items()
    }


def score(tuning: Tuning, task: Task, model: str) -> float:
    """The mean score over the held-out lines, as the gateway's answers have it."""

    def one(line: Line) -> float:
        reply = tuning.client.chat.completions.create(
            model=model, messages=line["messages"][:-1], max_tokens=task.max_tokens, temperature=0
        )
        return SCORERS[task.name](reply.choices[0].message.content or "", line)[task.measure]

    lines = lines_of(task.name, "heldout")
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(one, lines)) / len(lines)


def job_object(world: World, tuning: Tuning, name: str, training: str) -> dict[str, Any]:
    return {
        "apiVersion": "lorapool.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": world.namespace},
        "spec": {
            "baseModelRef": {"name": BASE},
            "data": {"training": {"uri": f"store://{world.namespace}/files/{training}"}},
            "lora": {"rank": 4, "targetModules": ["q_proj", "v_proj"]},
            "training": {"maxSteps": 16, "learningRate": "1.5e-3", "seed": 7},
            "checkpoints": {"every": "1s"},
            "promotion": {"policy": "Never"},
        },
    }


async def test_a_job_that_loses_its_pod_is_evicted_and_paused_ends_with_the_same_bits(
    world: World, tuning: Tuning
) -> None:
    """Meanwhile serving loses no request."""
    training = tuning.upload(lines_of("routing", "train", every=3))
    prober = Prober(world, ["routing"], pause_s=0.5)
    async with world.async_client() as client:
        await prober.ask(client, "routing")
    probing = asyncio.create_task(prober.run())
    try:
        await asyncio.to_thread(trained, world, job_object(world, tuning, "whole", training), {})
        interruptions = {3: lose_pod, 6: evict, 9: pause_and_resume, 12: lose_pod}
        await asyncio.to_thread(trained, world, job_object(world, tuning, "broken", training), interruptions)
    finally:
        prober.stop()
        await probing
    assert (prober.wrong, prober.lost) == ([], [])
    whole, broken = (world.get("ftj", name)["status"] for name in ("whole", "broken"))
    assert broken["result"]["digest"] == whole["result"]["digest"]
    assert broken["usage"]["restarts"] >= 3
    assert broken["progress"]["trainedTokens"] == whole["progress"]["trainedTokens"]


def trained(world: World, job: dict[str, Any], interruptions: dict[int, Any]) -> None:
    """Runs a job to its end; calls each interruption once its step was reached."""
    world.apply(job)
    name = job["metadata"]["name"]

    def status() -> dict[str, Any]:
        return dict(world.get("ftj", name).get("status", {}))

    for step, interrupt in interruptions.items():
        world.wait(
            f"step {step}",
            lambda step=step: status().get("progress", {}).get("step", 0) >= step or status().get("state"),
            timeout_s=TRAINED_S,
        )
        interrupt(world, name)
    world.wait("the end", lambda: status().get("state") == "Succeeded" or status().get("state"), timeout_s=TRAINED_S)


def trainer_pod(world: World) -> str:
    found = world.get("pods", "-l", "app.kubernetes.io/component=trainer")["items"]
    return str(next(pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]))


def lose_pod(world: World, name: str) -> None:
    """The process gets SIGKILL."""
    world.kubectl("delete", "pod", trainer_pod(world), "--grace-period=0", "--force", "--wait=false")


def evict(world: World, name: str) -> None:
    """What a drain does, and the scheduler for a pod of a higher priority."""
    pod = trainer_pod(world)
    metadata = {"name": pod, "namespace": world.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{world.namespace}/pods/{pod}/eviction"

    world.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def pause_and_resume(world: World, name: str) -> None:
    world.patch("ftj", name, {"run": "Paused"})
    world.wait("the pause", lambda: world.get("ftj", name)["status"]["state"] == "Paused", timeout_s=120)
    world.patch("ftj", name, {"run": "Run"})

"""Fine-tuning on the real cluster by the unmodified client: one trainer for all jobs of a base, models that answer."""

from __future__ import annotations

import json

import pytest
from e2e_tuning import Tuning, lines_of, with_shuffled_answers
from e2e_world import BASE, World
from openai import NotFoundError

SMALL = {"rank": 4, "target_modules": ["q_proj", "v_proj"], "max_steps": 8}
TRAINED_S = 600.0


def test_the_demos_job_made_a_model_that_learned_its_task(world: World, tuning: Tuning) -> None:
    trained = world.summary["trained"]
    assert trained["loss"] < trained["base_loss"] / 2
    assert trained["answer"] != trained["base_answer"]
    assert trained["model"] in tuning.models()

    job = world.get("ftj", trained["job"])
    assert {item["type"]: item["status"] for item in job["status"]["conditions"]} == dict.fromkeys(
        ("DataValid", "Admitted", "Evaluated", "Promoted", "Completed"), "True"
    ) | {"Progressing": "False"}
    assert job["status"]["usage"]["restarts"] == 0
    adapter = world.get("lora", job["status"]["result"]["adapter"])
    lineage = json.loads(adapter["metadata"]["annotations"]["lorapool.dev/lineage"])
    assert lineage["dataDigest"] == job["status"]["data"]["digest"]
    assert adapter["spec"]["source"]["digest"] == job["status"]["result"]["digest"]


def test_the_trainers_losses_are_those_of_the_gateways_answers(world: World, tuning: Tuning) -> None:
    """The base's before the first step, and the promoted adapter's after the last."""
    trained = world.summary["trained"]
    lines = lines_of("routing", "heldout", every=4)  # those of the demo
    assert tuning.loss_of(tuning.base, lines) == pytest.approx(trained["base_loss"], abs=1e-3)
    assert tuning.loss_of(trained["model"], lines) == pytest.approx(trained["loss"], abs=1e-3)


def test_the_first_request_of_a_new_runtime_may_be_for_a_trained_model(world: World, tuning: Tuning) -> None:
    """It is there before the access to the store is: that is delivered to a runtime while its base loads."""
    for pod in world.runtime_pods():
        world.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force", "--wait=false")
    trained = world.summary["trained"]
    assert tuning.answer(trained["model"], "routing") == trained["answer"]


def ready_gateways(world: World) -> set[str]:
    """Uids of the pods; the Deployment's status may still be of pods that were killed."""
    pods = world.get("pods", "-l", "app.kubernetes.io/component=gateway")["items"]
    return {
        pod["metadata"]["uid"]
        for pod in pods
        if any(item["type"] == "Ready" and item["status"] == "True" for item in pod["status"].get("conditions", ()))
    }


def test_jobs_share_one_trainer_and_go_on_while_operator_and_gateways_are_killed(world: World, tuning: Tuning) -> None:
    before = tuning.models()
    routing = tuning.create(tuning.upload(lines_of("routing", "train", every=3)), None, "first", **SMALL)
    sentiment = tuning.create(tuning.upload(lines_of("sentiment", "train", every=3)), None, "second", **SMALL)
    jobs = [routing, sentiment]
    world.wait("training", lambda: all(tuning.state(job) == "Training" for job in jobs), timeout_s=TRAINED_S)
    pods = tuning.trainer_pods()
    assert [tuning.status(job)["trainer"]["pod"] for job in jobs] == [pod["metadata"]["name"] for pod in pods] * 2
    killed = ready_gateways(world)
    for component in ("operator", "gateway"):
        selector = f"app.kubernetes.io/component={component}"
        world.kubectl("delete", "pods", "-l", selector, "--grace-period=0", "--force", "--wait=false")
    world.wait("other gateways", lambda: len(ready_gateways(world) - killed) == len(killed), timeout_s=120)

    ended = [tuning.ended(job, TRAINED_S) for job in jobs]
    assert [job.status for job in ended] == ["succeeded", "succeeded"]
    aliases = {str(job.fine_tuned_model) for job in ended}
    assert tuning.models() - before == aliases | {world.model(job.id) for job in ended}, "each result is there once"
    assert [pod["metadata"]["uid"] for pod in tuning.trainer_pods()] == [pod["metadata"]["uid"] for pod in pods]
    assert pods[0]["status"]["containerStatuses"][0]["restartCount"] == 0
    for job, task in zip(ended, ("routing", "sentiment"), strict=True):
        status = tuning.status(job)
        assert (status["usage"]["restarts"], status["progress"]["step"]) == (0, SMALL["max_steps"])
        assert tuning.answer(str(job.fine_tuned_model), task)


def test_a_job_whose_answers_are_shuffled_makes_no_model(world: World, tuning: Tuning) -> None:
    before = tuning.models()
    lines = lines_of("routing", "train", every=2)
    training = tuning.upload(with_shuffled_answers(lines))
    validation = tuning.upload(lines_of("routing", "heldout", every=4))
    world.apply(
        {
            "apiVersion": "lorapool.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "shuffled", "namespace": world.namespace},
            "spec": {
                "baseModelRef": {"name": BASE},
                "data": {
                    "training": {"uri": f"store://{world.namespace}/files/{training}"},
                    "validation": {"uri": f"store://{world.namespace}/files/{validation}"},
                },
                "lora": {"rank": 4, "targetModules": ["q_proj", "v_proj"]},
                "training": {"maxSteps": 12, "learningRate": "1.5e-3", "seed": 7},
                "promotion": {"policy": "Gated", "maxValidLoss": "0.7"},
            },
        }
    )
    world.wait(
        "the gate", lambda: world.get("ftj", "shuffled").get("status", {}).get("state") == "Failed", timeout_s=TRAINED_S
    )
    status = world.get("ftj", "shuffled")["status"]
    assert status["failure"]["reason"] == "GateNotMet", status["failure"]
    assert tuning.models() == before
    assert "shuffled" not in world.kubectl("get", "lora", "-o", "name")


def test_a_deleted_model_is_gone_with_its_files(world: World, tuning: Tuning) -> None:
    model = str(world.summary["trained"]["model"])
    adapter = str(world.get("ftj", world.summary["trained"]["job"])["status"]["result"]["adapter"])
    assert tuning.client.models.delete(model).deleted
    world.wait("the adapter's end", lambda: adapter not in world.kubectl("get", "lora", "-o", "name"), timeout_s=60)
    with pytest.raises(NotFoundError):
        tuning.client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])


def test_without_work_no_trainer_runs(world: World, tuning: Tuning) -> None:
    world.wait("the trainer's end", lambda: not tuning.trainer_pods() or "pods", timeout_s=120)
    assert world.condition("bm", BASE, "Ready")[0] == "True"

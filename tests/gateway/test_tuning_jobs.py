"""`/v1/fine_tuning/jobs` with the unmodified client: objects are made once, shown as the API has them, and private."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from gateway_world import KEY, OTHER_KEY
from store_kit import StoreProcess, running_store
from tuning_world import A, B, TuningWorld, tuning_world

from lorapool_api.tuning.finetunejob import ANNOTATION_JOB, FineTuneJobSpec
from lorapool_gateway.tuning import jobs as tuning_jobs

DIGEST = "sha256:" + "a" * 64
JOBS = "/v1/fine_tuning/jobs"
NOW = "2026-11-30T12:00:00Z"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with running_store(tmp_path_factory.mktemp("store")) as made:
        yield made


def spec_of(here: TuningWorld, name: str, namespace: str = A) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(here.objects.jobs[f"{namespace}/{name}"]["spec"])


async def test_a_job_is_an_object_with_what_the_client_chose(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        training, validation = await here.upload(b"1\n"), await here.upload(b"2\n")
        job = await client.fine_tuning.jobs.create(
            model="models/tiny",
            training_file=training,
            validation_file=validation,
            suffix="routing",
            seed=11,
            metadata={"team": "support"},
            method={
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}
                },
            },
            extra_body={"lorapool": {"rank": 4, "target_modules": ["q_proj"], "schedule": "Linear", "warmup": 0.1}},
        )
        spec = spec_of(here, job.id)
        assert spec.data.training.uri == f"store://{A}/files/{training}"
        assert str(spec.data.training.digest).startswith("sha256:")
        assert spec.data.validation is not None
        assert (spec.training.epochs, spec.training.batch_size, spec.training.seed) == (2, None, 11)
        assert math.isclose(float(str(spec.training.learning_rate)), 0.5 * float(base_rate(here)))
        assert (spec.lora.rank, spec.lora.target_modules, spec.training.schedule) == (4, ["q_proj"], "Linear")
        assert (spec.promotion.policy, spec.output.suffix) == ("Gated", "routing")
        assert (spec.base_model_ref.name, spec.base_model_ref.namespace) == ("tiny", "models")
        assert (job.status, job.organization_id, job.model, job.seed) == ("validating_files", A, "models/tiny", 11)
        assert (job.training_file, job.validation_file, job.metadata) == (training, validation, {"team": "support"})
        assert job.hyperparameters.n_epochs == 2
        assert (job.error, job.fine_tuned_model, job.finished_at, job.result_files) == (None, None, None, [])
        assert await client.fine_tuning.jobs.retrieve(job.id) == job


def base_rate(here: TuningWorld) -> str:
    [base] = [base for ref, base in here.world.routes.table.bases.items() if ref.name == "tiny"]
    return base.spec.fine_tuning.defaults.learning_rate


async def test_without_examples_to_measure_with_the_model_is_made_in_any_case(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        file = await here.upload()
        plain = await client.fine_tuning.jobs.create(model="tiny", training_file=file)
        assert spec_of(here, plain.id).promotion.policy == "Always"
        extra = {"lorapool": {"validation_fraction": 0.1}}
        split = await client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body=extra)
        assert spec_of(here, split.id).promotion.policy == "Gated"
        assert spec_of(here, split.id).data.validation_fraction == "0.1"


async def test_a_fine_tuned_model_is_continued(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        here.world.adapter("first", A, base="tiny", base_namespace="models")
        job = await client.fine_tuning.jobs.create(model=f"{A}/first", training_file=await here.upload())
        init_from = spec_of(here, job.id).init_from
        assert init_from is not None
        assert init_from.name == "first"


# --- what is refused, with its parameter


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": 5e-324}}, "hyperparameters.learning_rate_multiplier"),
        ({"lorapool": {"learning_rate": 1e-300}}, "lorapool.learning_rate"),
        ({"hyperparameters": {"learning_rate_multiplier": math.nan}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": "fast"}}, "hyperparameters.learning_rate_multiplier"),
        (
            {
                "hyperparameters": {"n_epochs": 2},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            },
            "hyperparameters",
        ),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 0}}}},
            "method.supervised.hyperparameters.batch_size",
        ),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a\nb"}, "suffix"),
        ({"suffix": "a\n"}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**40}, "seed"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"n_epochs": 3}, "n_epochs"),
        ({"model": None}, "model"),
        ({"training_file": ""}, "training_file"),
        ({"lorapool": {"rank": 0}}, "lorapool.rank"),
        ({"lorapool": {"rank": 200}}, "lorapool.rank"),
        ({"lorapool": {"target_modules": ["a b"]}}, "lorapool.target_modules"),
        ({"lorapool": {"learning_rate": "NaN"}}, "lorapool.learning_rate"),
        ({"lorapool": {"ranks": 8}}, "lorapool.ranks"),
        ({"training_file": "file-" + "x" * 24}, "training_file"),
        ({"validation_file": "file-" + "x" * 24}, "validation_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
    ],
)
async def test_a_wrong_parameter_is_named_and_makes_no_job(
    store: StoreProcess, body: dict[str, Any], param: str
) -> None:
    async with tuning_world(store) as here:
        given = {"model": "tiny", "training_file": await here.upload(), **body}
        answer = await here.call("POST", JOBS, content=json.dumps(given))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert here.objects.jobs == {}


async def test_one_file_is_not_trained_and_measured_with(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        file = await here.upload()
        with pytest.raises(openai.BadRequestError) as caught:
            await client.fine_tuning.jobs.create(model="tiny", training_file=file, validation_file=file)
        assert caught.value.param == "validation_file"
        assert here.objects.jobs == {}


async def test_unknown_forbidden_and_closed_models_are_one_and_the_same_404(store: StoreProcess) -> None:
    async with tuning_world(store) as here:
        here.world.base("secret", "elsewhere", fineTuning={"enabled": True})
        here.world.adapter("other", B, base="tiny", base_namespace="models")
        file = await here.upload()
        found = set()
        for model in ("closed", "elsewhere/secret", "nothing", f"{B}/other", "models/closed"):
            answer = await here.call("POST", JOBS, json={"model": model, "training_file": file})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
            found.add(answer.text.replace(model, "M"))
        assert len(found) == 1
        assert here.objects.jobs == {}


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_a_file_of_another_tenant_or_use_is_refused_in_the_words_for_an_unknown_one(
    store: StoreProcess, param: str
) -> None:
    async with tuning_world(store) as here, here.client() as client:
        mine = await here.upload()
        job = await client.fine_tuning.jobs.create(model="tiny", training_file=mine)
        here.objects.status(A, job.id, state="Succeeded", finishedAt=NOW)
        [result] = (await client.fine_tuning.jobs.retrieve(job.id)).result_files
        foreign, unknown = await here.upload(key=OTHER_KEY), "file-" + "y" * 24
        bodies = set()
        for file in (foreign, unknown, result):
            given = {"model": "tiny", "training_file": mine, param: file}
            answer = await here.call("POST", JOBS, json=given)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            bodies.add(answer.text.replace(file, "F"))
        assert len(bodies) == 1
        assert list(here.objects.jobs) == [f"{A}/{job.id}"]


# --- repeated calls


async def repeat(here: TuningWorld, body: dict[str, Any], count: int, *, gateway: int = 0, key: str = KEY) -> str:
    client = here.gateways[gateway].client(key)
    async with client:
        headers = {"x-stainless-retry-count": str(count)}
        answer = await client.post("/fine_tuning/jobs", body=body, cast_to=dict, options={"headers": headers})  # type: ignore[arg-type]
    return str(answer["id"])  # type: ignore[index]


async def test_a_repeated_call_is_answered_with_the_first_ones_job_by_any_gateway(
    store: StoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tuning_world(store, gateways=2) as here:
        body = {"model": "tiny", "training_file": await here.upload()}
        here.objects.watching = False  # what a watch has not shown yet is found as well
        first = await repeat(here, body, 0)
        assert await repeat(here, body, 1) == first
        assert await repeat(here, body, 2, gateway=1) == first
        assert len(here.objects.jobs) == 1
        assert await repeat(here, {**body, "seed": 1}, 1) != first
        assert await repeat(here, body, 0) != first  # sent once more on purpose
        other = {**body, "training_file": await here.upload(key=OTHER_KEY)}
        assert await repeat(here, other, 1, key=OTHER_KEY) != first
        assert len(here.objects.jobs) == 4
        monkeypatch.setattr(tuning_jobs, "REPEATED_S", -1.0)
        await repeat(here, body, 1)
        assert len(here.objects.jobs) == 5


async def test_a_repeated_call_finds_its_job_after_its_files_were_deleted(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        file = await here.upload()
        body = {"model": "tiny", "training_file": file}
        first = await repeat(here, body, 0)
        await client.files.delete(file)
        assert await repeat(here, body, 1) == first


async def test_a_job_that_only_another_gateway_has_seen_is_found(store: StoreProcess) -> None:
    async with tuning_world(store, gateways=2) as here:
        here.objects.watching = False
        job = await repeat(here, {"model": "tiny", "training_file": await here.upload()}, 0)
        async with here.client(gateway=1) as client:
            assert (await client.fine_tuning.jobs.retrieve(job)).id == job


# --- quotas


async def test_a_job_beyond_the_quota_is_429_before_there_is_an_object(store: StoreProcess) -> None:
    async with tuning_world(store, tuning_unfinished_jobs=2) as here, here.client() as client:
        jobs, body = client.fine_tuning.jobs, {"model": "tiny", "training_file": await here.upload()}
        here.objects.watching = False  # what this gateway made counts at once
        asked = [here.call("POST", JOBS, json={**body, "seed": seed}) for seed in range(5)]
        answers = await asyncio.gather(*asked)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429).json()["error"]
        assert (refused["type"], refused["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "has 2 unfinished fine-tuning jobs" in refused["message"]
        first, second = here.objects.jobs
        here.objects.watching = True
        for name in (first, second):
            here.objects.status(A, name.partition("/")[2], state="Queued")
        with pytest.raises(openai.RateLimitError):
            await jobs.create(**body, seed=9)  # type: ignore[arg-type]
        other = {**body, "training_file": await here.upload(key=OTHER_KEY)}
        assert (await here.call("POST", JOBS, OTHER_KEY, json=other)).status_code == 200
        here.objects.status(A, first.partition("/")[2], state="Succeeded")
        once = await repeat(here, body, 0)
        assert await repeat(here, body, 1) == once  # though it may make no further one
        assert len(here.objects.jobs) == 4


async def test_a_month_whose_tokens_are_used_up_is_429_and_not_worth_a_repetition(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        jobs, file = client.fine_tuning.jobs, await here.upload()
        job = await jobs.create(model="tiny", training_file=file)
        here.objects.status(A, job.id, state="Queued", queue={"reason": "TokenQuota"})
        with pytest.raises(openai.RateLimitError) as caught:
            await jobs.create(model="tiny", training_file=file, seed=2)
        assert (caught.value.type, caught.value.code) == ("insufficient_quota", "insufficient_quota")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert (await jobs.retrieve(job.id)).status == "queued"
        await jobs.cancel(job.id)
        await jobs.create(model="tiny", training_file=file, seed=2)  # the operator decides again


# --- the life of a job


async def test_a_job_is_paused_resumed_and_cancelled_and_an_ended_one_is_400(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        jobs = client.fine_tuning.jobs
        job = await jobs.create(model="tiny", training_file=await here.upload())
        here.objects.status(A, job.id, state="Training")
        assert (await jobs.retrieve(job.id)).status == "running"
        assert (await jobs.pause(job.id)).status == "paused"  # type: ignore[comparison-overlap]
        assert (await jobs.resume(job.id)).status == "running"
        assert (await jobs.cancel(job.id)).status == "cancelled"
        for call in (jobs.cancel, jobs.pause, jobs.resume):
            with pytest.raises(openai.BadRequestError) as caught:
                await call(job.id)
            assert caught.value.code == "job_ended"


async def test_a_job_shows_its_end_its_figures_and_its_failure(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        jobs, file = client.fine_tuning.jobs, await here.upload()
        good = await jobs.create(model="tiny", training_file=file)
        bad = await jobs.create(model="tiny", training_file=file, seed=2)
        here.objects.status(
            A, good.id, state="Succeeded", finishedAt=NOW, result={"model": "ft:tiny:team-a::1", "adapter": "x"},
            usage={"trainedTokens": 1234}, resolved={"epochs": 3, "batchSize": 8, "learningRate": 0.001},
            metrics={"bestStep": 20},
            checkpoints=[
                {"step": 10, "digest": DIGEST, "uri": "store://x/y", "trainLoss": 2.5, "at": NOW},
                {"step": 20, "digest": DIGEST, "uri": "store://x/y", "validLoss": 1.5, "at": NOW},
            ],
        )  # fmt: skip
        message = "Line 3 is not JSON."
        failure = {"reason": "InvalidDataset", "message": message, "line": 3}
        here.objects.status(A, bad.id, state="Failed", finishedAt=NOW, failure=failure)
        shown = await jobs.retrieve(good.id)
        assert (shown.status, shown.fine_tuned_model, shown.trained_tokens) == ("succeeded", "ft:tiny:team-a::1", 1234)
        assert (shown.hyperparameters.n_epochs, shown.hyperparameters.batch_size) == (3, 8)
        assert shown.finished_at == 1796040000
        points = (await jobs.checkpoints.list(good.id)).data
        assert [(item.step_number, item.fine_tuned_model_checkpoint) for item in points] == [
            (20, "ft:tiny:team-a::1"),
            (10, f"{good.id}:ckpt-step-10"),
        ]
        assert points[0].metrics.full_valid_loss == 1.5
        assert [item.step_number async for item in jobs.checkpoints.list(good.id, limit=1)] == [20, 10]
        failed = await jobs.retrieve(bad.id)
        assert failed.error is not None
        assert (failed.error.code, failed.error.message, failed.error.param) == (
            "invalid_training_file",
            message,
            "training_file",
        )
        assert (await jobs.list_events(bad.id)).data[0].message == message


async def test_the_metrics_of_a_job_are_a_file_of_its_owner(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        job = await client.fine_tuning.jobs.create(model="tiny", training_file=await here.upload())
        uid = here.objects.jobs[f"{A}/{job.id}"]["metadata"]["uid"]
        store.call("PUT", f"{A}/jobs/{uid}/result_files/step_metrics.csv", b"step,train_loss\n1,2.5\n")
        here.objects.status(A, job.id, state="Succeeded", finishedAt=NOW)
        [file_id] = (await client.fine_tuning.jobs.retrieve(job.id)).result_files
        assert (await client.files.content(file_id)).text == "step,train_loss\n1,2.5\n"
        assert (await client.files.retrieve(file_id)).purpose == "fine-tune-results"
        assert (await here.call("GET", f"/v1/files/{file_id}", OTHER_KEY)).status_code == 404
        await client.files.delete(file_id)
        assert (await here.call("GET", f"/v1/files/{file_id}")).status_code == 404


async def test_events_are_pages_of_the_trainers_lines_the_newest_first(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        job = await client.fine_tuning.jobs.create(model="tiny", training_file=await here.upload())
        uid = here.objects.jobs[f"{A}/{job.id}"]["metadata"]["uid"]
        for part in range(3):
            lines = [
                json.dumps({"id": f"ftevent-{part}-{number}", "created_at": 100 * part + number, "message": "m",
                            "type": "metrics", "data": {"step": number}})
                for number in range(4)
            ]  # fmt: skip
            store.call(
                "PUT", f"{A}/jobs/{uid}/events/{part:010d}.jsonl", ("\n".join([*lines, "not json", ""])).encode()
            )
        wanted = [f"ftevent-{part}-{number}" for part in (2, 1, 0) for number in (3, 2, 1, 0)]
        found = [item async for item in client.fine_tuning.jobs.list_events(job.id, limit=5)]
        assert [item.id for item in found[:-1]] == wanted
        assert found[-1].message == f"Created fine-tuning job: {job.id}"
        assert (found[0].type, found[0].data) == ("metrics", {"step": 3})
        one = await client.fine_tuning.jobs.list_events(job.id, limit=12)
        assert one.has_more


async def test_jobs_are_listed_in_pages_and_by_metadata(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        jobs, file = client.fine_tuning.jobs, await here.upload()
        made = [
            (await jobs.create(model="tiny", training_file=file, seed=seed, metadata={"kind": str(seed % 2)})).id
            for seed in range(5)
        ]
        assert {item.id async for item in jobs.list(limit=2)} == set(made)
        assert {item.id async for item in jobs.list(metadata={"kind": "1"})} == {made[1], made[3]}


# --- models


async def test_a_tuned_model_is_deleted_with_its_files_and_no_other_model_is(store: StoreProcess) -> None:
    async with tuning_world(store) as here, here.client() as client:
        uri = f"store://{A}/adapters/job-1"
        for namespace, name, tuned in ((A, "mine", True), (A, "by-hand", False), (B, "theirs", True)):
            key = f"{namespace}/{name}"
            here.world.adapter(
                name, namespace, base="tiny", base_namespace="models", source={"uri": uri}, alias=f"ft:{name}"
            )
            if tuned:
                here.world.adapters[key]["metadata"]["annotations"] = {ANNOTATION_JOB: "x"}
        here.world.publish()
        store.call("PUT", f"{A}/adapters/job-1/adapter_config.json", b"{}")
        for model in ("ft:by-hand", "ft:theirs", f"{B}/theirs", "models/tiny", "nothing"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.models.delete(model)
            assert caught.value.code == "model_not_found"
        deleted = await client.models.delete("ft:mine")
        assert (deleted.id, deleted.deleted) == ("ft:mine", True)
        [gone] = here.objects.deleted
        assert gone.endswith(f"/namespaces/{A}/loraadapters/mine@uid-{A}-mine")
        assert store.keys(A, "adapters/") == []


async def test_what_is_not_offered_is_404_by_name(store: StoreProcess) -> None:
    async with tuning_world(store) as here:
        for path in ("/v1/uploads", "/v1/fine_tuning/alpha/graders/run", "/v1/fine_tuning/jobs/x/y"):
            assert (await here.call("POST", path, json={})).status_code == 404

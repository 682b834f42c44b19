"""The operator against a real API server and a trainer whose reports the test writes: the life of FineTuneJobs."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest
from fake_trainer import FakeTrainer
from fakes_operator import FakeInspector, digest, found
from operator_world import (
    Api,
    RefusedError,
    condition,
    operator_program,
    owned_by,
    running_operator,
    token_of,
    until,
)
from pydantic import create_model
from runtime_process import free_port
from store_kit import running_store

from lorapool_api.base_modules import BaseModule, compact
from lorapool_api.store_protocol import StoreAccess
from lorapool_api.tuning.finetunejob import FINALIZER, FineTuneJobSpec, TrainingSettings
from lorapool_api.tuning.states import JobFailure, JobState
from lorapool_operator.process import Process
from lorapool_operator.world.cluster_cache import Meta
from lorapool_operator.world.tuning import DataFinding, TuningObject

pytestmark = pytest.mark.apiserver

PATIENCE_S = 120.0
"""For programs, which take long to start on a machine that is busy."""
QUEUE = "kueue.x-k8s.io/queue-name"
SUSPENDED = f"profiles:\n  default: {{trainer: {{suspend: true, jobLabels: {{{QUEUE}: tuning}}}}}}\n"


@dataclass
class Files:
    """The files of jobs: findings by the name of the job, and what was deleted."""

    findings: dict[str, DataFinding] = field(default_factory=dict)
    deleted: list[tuple[str, bool]] = field(default_factory=list)

    async def check(self, job: TuningObject) -> DataFinding:
        return self.findings.get(job.meta.name, DataFinding(examples=20, digest=digest("data")))

    async def delete(self, job: Meta, *, keep_result: bool) -> None:
        self.deleted.append((job.name, keep_result))

    def access(self, job: TuningObject, initial_uri: str | None) -> StoreAccess:
        return StoreAccess(url="http://store", token=f"token-of-{job.meta.uid}")


@asynccontextmanager
async def operator(api: Api, folder: Path, files: Files, **changes: Any) -> AsyncIterator[Process]:
    inspector = FakeInspector()
    settings = {"tuning": True, "tuning_status_interval_s": 0.2, **changes}
    async with running_operator(api, folder, inspector, job_files=files, **settings) as process:
        yield process


async def state(api: Api, name: str) -> str:
    return str(((await api.get("finetunejobs", name)).get("status") or {}).get("state"))


async def trainer_pod(api: Api, base: dict[str, Any], port: int, name: str = "trainer-pod") -> None:
    """Creates what the Job controller would: the pod of the trainer's Job, from its template."""
    job = await until(lambda: api.find("jobs", "tiny-trainer"))
    template = job["spec"]["template"]
    container = {"name": "trainer", "image": "none", "ports": [{"name": "http", "containerPort": port}]}
    metadata = {"name": name, "labels": template["metadata"]["labels"], **owned_by("Job", job, "batch/v1")}
    spec = {"containers": [container], "automountServiceAccountToken": False, "nodeName": "nowhere"}
    await api.create("pods", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    await api.pod_ready(name)


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    uid, space = job["metadata"]["uid"], job["metadata"]["namespace"]
    uri = f"store://{space}/adapters/{uid}"
    return {"uri": uri, "digest": found(uri).digest, "sizeBytes": 9}


async def test_a_job_is_trained_passes_the_gate_and_becomes_a_model(api: Api, tmp_path: Path) -> None:
    files = Files()
    async with operator(api, tmp_path, files) as process:
        base = await api.base(fineTuning={"enabled": True, "idleAfter": "2s"})
        job = await api.tuning("ftjob-1", output={"suffix": "routing"})
        uid = job["metadata"]["uid"]
        async with FakeTrainer(token_of(base)).serving() as trainer:
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, uid))
            sent = trainer.jobs[uid]
            assert (sent.lora.rank, sent.data.training.digest) == (8, digest("data"))
            assert sent.store == StoreAccess(url="http://store", token=f"token-of-{uid}")
            await trainer.say(uid, JobState.TRAINING, progress={"step": 3, "totalSteps": 30})
            await until(lambda: state(api, "ftjob-1"), "Training")
            await until(lambda: _steps(api, "ftjob-1"), "3/30")
            assert FINALIZER in (await api.get("finetunejobs", "ftjob-1"))["metadata"]["finalizers"]
            metrics = {"trainLoss": 0.5, "validLoss": 1.0, "baseValidLoss": 2.0}
            await trainer.say(uid, JobState.SUCCEEDED, result=result_of(job), metrics=metrics)
            await until(lambda: state(api, "ftjob-1"), "Succeeded")
            ended = await api.get("finetunejobs", "ftjob-1")
            adapter = await api.get("loraadapters", "ftjob-1")
            model = f"ft:tiny:{api.namespace}:routing:{uid[:8]}"
            assert (ended["status"]["result"]["model"], adapter["status"]["alias"]) == (model, model)
            assert adapter["spec"]["source"]["digest"] == ended["status"]["result"]["digest"]
            assert "ownerReferences" not in adapter["metadata"]
            assert condition(ended, "Promoted") == ("True", "Promoted")
            await until(lambda: _forgotten(trainer, uid))
            assert trainer.puts == [uid]
            await trainer.idle(5.0)
            await until(lambda: _gone(api, "jobs", "tiny-trainer"))
        await api.delete("finetunejobs", "ftjob-1", grace_s=None)
        await until(lambda: _gone(api, "finetunejobs", "ftjob-1"))
        assert files.deleted == [("ftjob-1", True)]  # the model is served from the result
        assert await api.find("loraadapters", "ftjob-1")
        assert process.control.tuning is not None


async def _registered(trainer: FakeTrainer, uid: str) -> bool:
    return uid in trainer.jobs


async def _forgotten(trainer: FakeTrainer, uid: str) -> bool:
    return uid in trainer.deletes


async def _gone(api: Api, plural: str, name: str) -> bool:
    item = await api.find(plural, name)
    return item is None or ("deletionTimestamp" in item["metadata"] and plural == "jobs")


async def _steps(api: Api, name: str) -> str:
    return str((((await api.get("finetunejobs", name)).get("status") or {}).get("progress") or {}).get("steps"))


async def test_a_job_that_does_not_pass_the_gate_makes_no_model(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files()):
        base = await api.base(fineTuning={"enabled": True})
        job = await api.tuning("shuffled")
        uid = job["metadata"]["uid"]
        async with FakeTrainer(token_of(base)).serving() as trainer:
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, uid))
            metrics = {"validLoss": 2.5, "baseValidLoss": 2.0}
            await trainer.say(uid, JobState.SUCCEEDED, result=result_of(job), metrics=metrics)
            await until(lambda: state(api, "shuffled"), "Failed")
        ended = await api.get("finetunejobs", "shuffled")
        assert ended["status"]["failure"]["reason"] == "GateNotMet"
        assert await api.items("loraadapters") == []


async def test_a_new_operator_continues_a_running_job_without_doing_anything_twice(api: Api, tmp_path: Path) -> None:
    files = Files()
    base = await api.base(fineTuning={"enabled": True})
    job = await api.tuning("j")
    uid = job["metadata"]["uid"]
    async with FakeTrainer(token_of(base)).serving() as trainer:
        async with operator(api, tmp_path, files):
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, uid))
            await trainer.say(uid, JobState.TRAINING, progress={"step": 3, "totalSteps": 30})
            await until(lambda: state(api, "j"), "Training")
        session = await api.get("jobs", "tiny-trainer")
        metrics = {"validLoss": 1.0, "baseValidLoss": 2.0}
        await trainer.say(uid, JobState.SUCCEEDED, result=result_of(job), metrics=metrics)
        async with operator(api, tmp_path, files):
            await until(lambda: state(api, "j"), "Succeeded")
            assert (await api.get("jobs", "tiny-trainer"))["metadata"]["uid"] == session["metadata"]["uid"]
            await until(lambda: _forgotten(trainer, uid))
        assert len(await api.items("loraadapters")) == 1
        assert set(trainer.deletes) == {uid}  # it may be repeated, where an older report arrives after it


async def test_a_restarted_trainer_is_sent_its_jobs_again(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files()):
        base = await api.base(fineTuning={"enabled": True})
        uid = (await api.tuning("j"))["metadata"]["uid"]
        async with FakeTrainer(token_of(base)).serving() as trainer:
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, uid))
            await trainer.say(uid, JobState.TRAINING)
            await until(lambda: state(api, "j"), "Training")
            await trainer.restart("boot-2")
            await until(lambda: _registered(trainer, uid))
            await trainer.say(uid, JobState.TRAINING, usage={"restarts": 1})
            await until(lambda: state(api, "j"), "Training")


async def test_a_job_is_sent_once_however_often_it_is_planned_before_the_trainers_next_report(
    api: Api, tmp_path: Path
) -> None:
    async with operator(api, tmp_path, Files(), poll_wait_s=5.0):
        base = await api.base(fineTuning={"enabled": True})
        first = (await api.tuning("first"))["metadata"]["uid"]
        async with FakeTrainer(token_of(base), late=True).serving() as trainer:
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, first))
            second = (await api.tuning("second"))["metadata"]["uid"]  # its data is checked while the trainer runs
            await until(lambda: _registered(trainer, second))
            for number in range(5):
                change = {"metadata": {"annotations": {"planned-again": str(number)}}}
                await api.patch("basemodels", "tiny", change)
                await asyncio.sleep(0.1)
            for uid, name in ((first, "first"), (second, "second")):
                await trainer.say(uid, JobState.TRAINING)
                await until(lambda name=name: state(api, name), "Training")
            assert trainer.puts == [first, second]


async def test_pause_and_cancel_reach_the_trainer(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files()):
        base = await api.base(fineTuning={"enabled": True})
        uid = (await api.tuning("j"))["metadata"]["uid"]
        async with FakeTrainer(token_of(base)).serving() as trainer:
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, uid))
            await trainer.say(uid, JobState.TRAINING)
            await until(lambda: state(api, "j"), "Training")
            await api.patch("finetunejobs", "j", {"spec": {"run": "Paused"}})
            await until(lambda: _run(trainer, uid), "Paused")
            await trainer.say(uid, JobState.PAUSED)
            await until(lambda: state(api, "j"), "Paused")
            await api.patch("finetunejobs", "j", {"spec": {"run": "Cancelled"}})
            await until(lambda: state(api, "j"), "Cancelled")
            await until(lambda: _forgotten(trainer, uid))


async def _run(trainer: FakeTrainer, uid: str) -> str:
    return trainer.jobs[uid].run.value


BAD: list[tuple[dict[str, Any], DataFinding, str]] = [
    ({"lora": {"rank": 32}}, DataFinding(examples=20), "Incompatible"),
    ({"lora": {"targetModules": ["nope"]}}, DataFinding(examples=20), "Incompatible"),
    (
        {"data": {"training": {"uri": "store://other/files/x"}, "validationFraction": "0.1"}},
        DataFinding(examples=20),
        "InvalidDataset",
    ),
    ({}, DataFinding(failure=JobFailure.TOO_FEW_EXAMPLES, message="9 examples, at least 10"), "TooFewExamples"),
    ({}, DataFinding(failure=JobFailure.INVALID_DATASET, message="line 3: not JSON", line=3), "InvalidDataset"),
]


async def test_what_can_never_train_fails_before_any_pod(api: Api, tmp_path: Path) -> None:
    files = Files({f"bad-{number}": finding for number, (_, finding, _) in enumerate(BAD)})
    await api.base(fineTuning={"enabled": True})
    modules = compact([BaseModule("model.layers.0.self_attn.q_proj", 8, 8)]).dump()
    await api.patch("basemodels", "tiny", {"status": {"modules": modules}}, sub="status")
    for number, (spec, _, _) in enumerate(BAD):
        await api.tuning(f"bad-{number}", **spec)
    async with operator(api, tmp_path, files):
        for number, (_, finding, reason) in enumerate(BAD):
            await until(lambda name=f"bad-{number}": state(api, name), "Failed")
            ended = await api.get("finetunejobs", f"bad-{number}")
            assert (ended["status"]["failure"]["reason"], ended["status"]["failure"].get("line")) == (
                reason,
                finding.line,
            )
        assert await api.find("jobs", "tiny-trainer") is None


async def test_jobs_whose_base_cannot_tune_wait_without_a_pod_until_it_can(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files()):
        await api.tuning("j")
        await until(lambda: _admitted(api, "j"), ("False", "BaseNotFound"))
        await api.base()
        await until(lambda: _admitted(api, "j"), ("False", "TuningDisabled"))
        assert await api.find("jobs", "tiny-trainer") is None
        await api.patch("basemodels", "tiny", {"spec": {"fineTuning": {"enabled": True}}})
        await until(lambda: api.find("jobs", "tiny-trainer"))


async def _admitted(api: Api, name: str) -> tuple[str, str]:
    return condition(await api.get("finetunejobs", name), "Admitted")


async def test_with_suspend_nothing_starts_until_it_is_released(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files()) as process:
        (tmp_path / "profiles.yaml").write_text(SUSPENDED)
        await until(lambda: _suspends(process))
        await api.base(fineTuning={"enabled": True})
        await api.tuning("j")
        await until(lambda: _admitted(api, "j"), ("False", "AwaitingRelease"))
        session = await api.get("jobs", "tiny-trainer")
        assert (session["spec"]["suspend"], session["metadata"]["labels"][QUEUE]) == (True, "tuning")
        await api.patch("jobs", "tiny-trainer", {"spec": {"suspend": False}})  # as Kueue does
        await until(lambda: _admitted(api, "j"), ("False", "TrainerStarting"))


async def _suspends(process: Process) -> bool:
    return process.control.observer.profiles["default"].trainer.suspend


async def test_one_job_too_many_is_refused(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files(), tuning_unfinished_jobs=1):
        await api.base(fineTuning={"enabled": True})
        await api.tuning("first")
        await until(lambda: _admitted(api, "first"), ("False", "TrainerStarting"))
        await api.tuning("second")
        await until(lambda: state(api, "second"), "Failed")
        assert (await api.get("finetunejobs", "second"))["status"]["failure"]["reason"] == "QuotaExceeded"


async def test_without_the_setting_jobs_are_left_alone(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files(), tuning=False):
        await api.base(fineTuning={"enabled": True})
        await api.tuning("j")
        await api.adapter("a")
        await until(lambda: _adapter_ready(api), ("True", "Parked"))
        assert "status" not in await api.get("finetunejobs", "j")
        with pytest.raises(RefusedError):
            await api.get("jobs", "tiny-trainer")


async def test_a_job_that_is_deleted_after_tuning_was_switched_off_goes_with_its_files(
    api: Api, tmp_path: Path
) -> None:
    files = Files()
    async with operator(api, tmp_path, files):
        await api.base(fineTuning={"enabled": True})
        await api.tuning("j")
        await until(lambda: _finalized(api, "j"))
    await api.delete("finetunejobs", "j", grace_s=None)
    assert (await api.get("finetunejobs", "j"))["metadata"]["deletionTimestamp"]
    async with operator(api, tmp_path, files, tuning=False):
        await until(lambda: _gone(api, "finetunejobs", "j"))
    assert files.deleted == [("j", False)]


async def _finalized(api: Api, name: str) -> bool:
    return FINALIZER in ((await api.get("finetunejobs", name))["metadata"].get("finalizers") or ())


async def test_a_job_of_a_newer_version_has_a_condition_and_nothing_happens_to_it(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.base(fineTuning={"enabled": True})
    await api.tuning("j", training={"schedule": "Linear"})
    old = create_model("OldTraining", __base__=TrainingSettings, schedule=(Literal["Cosine"], "Cosine"))
    older = create_model("OldSpec", __base__=FineTuneJobSpec, training=(old, old()))
    monkeypatch.setattr("lorapool_operator.world.tuning.FineTuneJobSpec", older)
    async with operator(api, tmp_path, Files()):
        await until(lambda: _progressing(api, "j"), ("False", "Unreadable"))
        job = await api.get("finetunejobs", "j")
        [shown] = job["status"]["conditions"]
        assert "training.schedule" in shown["message"]
        assert "state" not in job["status"]
        await api.tuning("other")
        await until(lambda: api.find("jobs", "tiny-trainer"))
        events = [item for item in await api.items("events") if item["involvedObject"]["name"] == "j"]
        assert [item["reason"] for item in events] == ["Unreadable"]
    monkeypatch.undo()
    async with operator(api, tmp_path, Files()):
        await until(lambda: _progressing(api, "j"), ("False", "Pending"))


async def _progressing(api: Api, name: str) -> tuple[str, str]:
    job = await api.get("finetunejobs", name)
    return condition(job, "Progressing") if (job.get("status") or {}).get("conditions") else ("", "")


async def test_a_job_that_a_trainer_could_not_read_is_trained_again_and_not_twice(api: Api, tmp_path: Path) -> None:
    async with operator(api, tmp_path, Files()) as process:
        tuning = process.control.tuning
        assert tuning is not None
        tuning._setup = replace(tuning._setup, limits=replace(tuning._setup.limits, retry_s=1.0))
        base = await api.base(fineTuning={"enabled": True})
        uid = (await api.tuning("j"))["metadata"]["uid"]
        async with FakeTrainer(token_of(base)).serving() as trainer:
            await trainer_pod(api, base, trainer.port)
            await until(lambda: _registered(trainer, uid))
            await trainer.say(uid, JobState.FAILED, failure={"reason": "SourceUnavailable", "message": "503"})
            await until(lambda: _forgotten(trainer, uid))
            await until(lambda: _registered(trainer, uid))
            await trainer.say(uid, JobState.TRAINING)
            await until(lambda: state(api, "j"), "Training")
            assert "failure" not in (await api.get("finetunejobs", "j"))["status"]


# --- a killed operator


async def tokens_of(port: int, job: str) -> float | None:
    """The exported counter of a job's tokens; None while there is none."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
            text = await response.text()
    except aiohttp.ClientError:
        return None
    found = re.search(rf'tuning_job_trained_tokens_total{{[^}}]*fine_tune_job="{job}"}} (\S+)', text)
    return float(found[1]) if found else None


async def recorded(api: Api) -> tuple[int, int] | None:
    """Tokens of the month, and the number of jobs that are in the record."""
    item = await api.find("configmaps", "lorapool-operator-tokens")
    record = json.loads(item["data"][api.namespace]) if item is not None else None
    return (record["tokens"], len(record["jobs"])) if record is not None else None


async def test_a_killed_operator_loses_no_figure_and_counts_no_token_of_the_month_twice(
    api: Api, tmp_path: Path
) -> None:
    port, line = (
        free_port(),
        json.dumps({"messages": [{"role": role, "content": "x"} for role in ("user", "assistant")]}),
    )
    base = await api.base(fineTuning={"enabled": True})
    with running_store(tmp_path / "store") as store:
        store.call("PUT", f"{api.namespace}/files/file-1", f"{line}\n".encode() * 12)
        own = {
            "TUNING": "true",
            "TUNING_MONTH_TOKENS": "2000",
            "TUNING_STATUS_INTERVAL_S": "0.2",
            "STORE_URL": store.url,
            "STORE_TOKEN_FILE": str(store.folder / "token"),
            "METRICS_PORT": str(port),
            "LEADER_ELECTION": "false",
            "POLL_WAIT_S": "1",
        }
        uid = (await api.tuning("j"))["metadata"]["uid"]
        shown = f"{api.namespace}/j"
        async with FakeTrainer(token_of(base)).serving() as trainer:
            async with operator_program(api, tmp_path, **own) as program:
                await trainer_pod(api, base, trainer.port)
                await until(lambda: _registered(trainer, uid), within_s=PATIENCE_S)
                await trainer.say(uid, JobState.TRAINING, usage={"trainedTokens": 1000})
                await until(lambda: tokens_of(port, shown), 1000.0, within_s=PATIENCE_S)
                await until(lambda: recorded(api), (1000, 1), within_s=PATIENCE_S)
                program.process.kill()
            assert program.code == -signal.SIGKILL
            await trainer.say(uid, JobState.TRAINING, usage={"trainedTokens": 1500})
            async with operator_program(api, tmp_path, **own) as program:
                seen: set[float | None] = set()

                async def grown() -> bool:
                    seen.add(await tokens_of(port, shown))
                    return 1500.0 in seen

                await until(grown, within_s=PATIENCE_S)
                assert seen <= {None, 1000.0, 1500.0}  # a counter never falls
                await until(lambda: recorded(api), (1500, 1), within_s=PATIENCE_S)
                program.process.kill()
            async with operator_program(api, tmp_path, **own) as program:
                await until(lambda: tokens_of(port, shown), 1500.0, within_s=PATIENCE_S)
                await trainer.say(uid, JobState.TRAINING, usage={"trainedTokens": 1600})
                await until(lambda: tokens_of(port, shown), 1600.0, within_s=PATIENCE_S)
                await api.delete("finetunejobs", "j", grace_s=None)
                await until(lambda: _gone(api, "finetunejobs", "j"), within_s=PATIENCE_S)
                assert await recorded(api) == (1600, 1)  # though it was not time to write
                uid = (await api.tuning("next"))["metadata"]["uid"]
                await until(lambda: _registered(trainer, uid), within_s=PATIENCE_S)
                await trainer.say(uid, JobState.TRAINING, usage={"trainedTokens": 600})
                await until(lambda: _run(trainer, uid), "Paused", within_s=PATIENCE_S)
                await trainer.say(uid, JobState.PAUSED, usage={"trainedTokens": 600})
                await until(lambda: _admitted(api, "next"), ("False", "TokenQuota"), within_s=PATIENCE_S)
            assert (program.code, "Traceback" in program.log) == (0, False), program.log


async def _adapter_ready(api: Api) -> tuple[str, str]:
    return condition(await api.get("loraadapters", "a"), "Ready")

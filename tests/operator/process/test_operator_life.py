"""The operator against a real API server: bases, adapters, and their status while things change."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from fakes_operator import FakeInspector, ScriptedRuntime, digest, found
from operator_world import MASTER_TOKEN, Api, condition, running_operator, token_of, until

from lorapool_api.base_modules import BaseModule, BaseModules, compact
from lorapool_api.common import ANNOTATION_DELETION_COST, ANNOTATION_RETRY, AdapterKey, FailureReason
from lorapool_api.loraadapter import UsagePart
from lorapool_api.protocol import AdapterState, ErrorDetail, ResolveAnswer, Tier, runtime_token, token_sha256
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import SourceSettings
from lorapool_operator.world.observed import SourceFailure

pytestmark = pytest.mark.apiserver

ROOT = Path(__file__).resolve().parents[3]


async def ready(api: Api, name: str) -> tuple[str, str]:
    return condition(await api.get("loraadapters", name), "Ready")


async def loaded(api: Api, name: str) -> tuple[str, str]:
    return condition(await api.get("loraadapters", name), "Loaded")


async def base_ready(api: Api, name: str = "tiny") -> tuple[str, str]:
    return condition(await api.get("basemodels", name), "Ready")


def key_of(adapter: dict[str, Any], text: str | None = None) -> AdapterKey:
    return AdapterKey(adapter["metadata"]["uid"], digest(text or adapter["spec"]["source"]["uri"]))


async def test_a_base_gets_its_children_and_an_adapter_is_inspected(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base()
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("True", "Parked"))

        async def children() -> list[Any]:
            kinds = ("deployments", "services", "poddisruptionbudgets")
            found = [await api.find(plural, "tiny-runtime") for plural in kinds]
            return found if all(found) else []

        deployment, service, budget = await until(children)
        assert deployment["spec"]["replicas"] == 1
        assert service["spec"]["clusterIP"] == "None"
        assert budget["spec"]["maxUnavailable"] == 1
        status = (await api.get("loraadapters", "a"))["status"]
        assert status["digest"] == digest("hf://org/a")
        assert (status["rank"], status["loaded"], status["state"]) == (8, "0/1", "Parked")


async def test_no_object_ever_gets_a_finalizer_or_an_annotation(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base()
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        await until(lambda: base_ready(api), ("False", "Starting"))
        for plural in ("basemodels", "loraadapters"):
            for item in await api.items(plural):
                assert "finalizers" not in item["metadata"]
                assert "annotations" not in item["metadata"]
    await api.delete("loraadapters", "a")
    await api.delete("basemodels", "tiny")
    assert await api.find("loraadapters", "a") is None
    assert await api.find("basemodels", "tiny") is None


# One that only a change heals, and the one that is looked for again (all: decisions/test_plan_adapter.py).
@pytest.mark.parametrize("reason", [FailureReason.CORRUPT_ARTIFACT, FailureReason.SOURCE_NOT_FOUND])
async def test_a_terminal_failure_is_typed_and_not_tried_again_at_once(
    api: Api, tmp_path: Path, reason: FailureReason
) -> None:
    inspector = FakeInspector({"hf://org/bad": ArtifactError(reason, "it is bad; do this instead")})
    async with running_operator(api, tmp_path, inspector, retry_min_s=60.0):
        await api.base()
        await api.adapter("bad")
        await api.adapter("good")
        await until(lambda: ready(api, "bad"), ("False", reason.value))
        await until(lambda: ready(api, "good"), ("True", "Parked"))
        failure = (await api.get("loraadapters", "bad"))["status"]["failure"]
        assert failure["message"].startswith("it is bad; do this instead")
        assert "lorapool.dev/retry" in failure["message"] or reason.repeated
        assert ("retryAt" in failure) == reason.repeated
        await asyncio.sleep(1.0)
        assert inspector.asked.count("hf://org/bad") == 1


async def test_the_retry_annotation_has_a_terminal_failure_inspected_again(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector({"hf://org/a": ArtifactError(FailureReason.TOO_LARGE, "3 GiB; save it in bf16")})
    async with running_operator(api, tmp_path, inspector):
        await api.base()
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("False", "TooLarge"))
        del inspector.answers["hf://org/a"]
        await api.patch("loraadapters", "a", {"metadata": {"annotations": {ANNOTATION_RETRY: "1"}}})
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        assert "failure" not in (await api.get("loraadapters", "a"))["status"]


async def test_a_changed_credential_has_what_was_refused_inspected_again_at_once(api: Api, tmp_path: Path) -> None:
    denied = ArtifactError(FailureReason.UNAUTHORIZED, "401; set HF_TOKEN")
    inspector = FakeInspector({"hf://org/a": denied, "hf://org/tiny": denied})
    mounted = tmp_path / "credentials"
    mounted.mkdir()
    (mounted / "HF_TOKEN").write_text("expired")
    sources = SourceSettings(credentials_dir=mounted)
    async with running_operator(api, tmp_path, inspector, sources=sources, retry_min_s=600.0, resync_s=600.0):
        await api.base()
        await api.base("other", source={"uri": "hf://org/other"})
        await api.adapter("a", base="other")
        await until(lambda: base_ready(api), ("False", "Unauthorized"))
        await until(lambda: ready(api, "a"), ("False", "Unauthorized"))
        inspector.answers.clear()
        (mounted / "HF_TOKEN").write_text("valid")
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        await until(lambda: base_ready(api), ("False", "Starting"))


async def test_the_documented_commands_retry_what_failed_in_a_namespace(api: Api, tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/debug-a-pending-adapter.md").read_text()
    [block] = [part for part in re.findall(r"```sh\n(.*?)```", page, re.S) if "--field-selector" in part]
    commands = re.findall(r"^kubectl.*?(?<!\\)$", block, re.S | re.M)
    failures = {
        "hf://my-org/a": ArtifactError(FailureReason.UNAUTHORIZED, "401"),
        "hf://my-org/b": ArtifactError(FailureReason.INVALID_SOURCE, "no"),
        "hf://other/c": ArtifactError(FailureReason.INVALID_SOURCE, "no"),
    }
    inspector = FakeInspector(dict(failures))
    async with running_operator(api, tmp_path, inspector, retry_min_s=600.0, resync_s=600.0):
        await api.base()
        for uri, failure in failures.items():
            name = uri[-1]
            await api.adapter(name, source={"uri": uri})
            await until(lambda name=name: ready(api, name), ("False", failure.reason.value))
        for command, retried in zip(commands, ("abc", "a", "ab"), strict=True):
            inspector.asked.clear()
            await asyncio.to_thread(shell, api, command.replace("team-support", api.namespace).replace("+%s", "+%N"))
            expected = {uri for uri in failures if uri[-1] in retried}
            await until(lambda expected=expected: asked(inspector, expected))
            await asyncio.sleep(0.3)  # whatever else was annotated would have been inspected by now
            assert set(inspector.asked) == expected, command


def shell(api: Api, command: str) -> None:
    environ = {**os.environ, "KUBECONFIG": str(api.server.kubeconfig)}
    environ["PATH"] = f"{api.server.bin_dir}:{environ['PATH']}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def asked(inspector: FakeInspector, expected: set[str]) -> bool:
    return set(inspector.asked) >= expected


async def test_a_source_that_is_down_is_tried_again_until_it_is_up(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector({"hf://org/a": ArtifactError(FailureReason.SOURCE_UNAVAILABLE, "502 from the hub")})
    async with running_operator(api, tmp_path, inspector):
        await api.base()
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("False", "SourceUnavailable"))
        failure = (await api.get("loraadapters", "a"))["status"]["failure"]
        assert failure["retryAt"]

        async def tried_again() -> bool:
            return bool((await api.get("loraadapters", "a"))["status"]["failure"]["attempts"] >= 2)

        await until(tried_again)
        del inspector.answers["hf://org/a"]
        await until(lambda: ready(api, "a"), ("True", "Parked"))


async def test_a_rank_above_the_bound_is_refused_until_the_bound_is_raised(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector({"hf://org/a": found("a", rank=64)})
    async with running_operator(api, tmp_path, inspector):
        await api.base(lora={"maxRank": 16})
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("False", "RankTooHigh"))
        assert "r <= 16" in (await api.get("loraadapters", "a"))["status"]["failure"]["message"]
        await api.patch("basemodels", "tiny", {"spec": {"lora": {"maxRank": 64}}})
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        assert inspector.asked == ["hf://org/a"]


async def test_an_adapter_without_its_base_waits_and_recovers_by_itself(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("False", "BaseNotFound"))
        await api.base()
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        await api.delete("basemodels", "tiny")
        await until(lambda: ready(api, "a"), ("False", "BaseNotFound"))
        await api.base()
        await until(lambda: ready(api, "a"), ("True", "Parked"))


async def test_a_recreated_base_with_other_weights_has_its_adapters_inspected_again(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector()
    async with running_operator(api, tmp_path, inspector):
        await api.base()
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        await api.delete("basemodels", "tiny")
        inspector.answers["hf://org/a"] = SourceFailure(
            FailureReason.WRONG_BASE, "q_proj is 8x8; point baseModelRef elsewhere"
        )
        await api.base()
        await until(lambda: ready(api, "a"), ("False", "WrongBase"))


async def test_a_suspended_adapter_leaves_the_runtime_and_comes_back(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            await api.patch("loraadapters", "a", {"spec": {"suspend": True}})
            await until(lambda: ready(api, "a"), ("False", "Suspended"))
            await until(lambda: loaded(api, "a"), ("False", "Suspended"))
            assert set(runtime.deleted) == {key_of(adapter)}
            await api.patch("loraadapters", "a", {"spec": {"suspend": False}})
            await until(lambda: ready(api, "a"), ("True", "Parked"))


async def test_loaded_is_only_what_a_runtime_reports_and_ends_with_its_pod(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=600.0):  # only the watch event can cause it
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: base_ready(api), ("True", "Ready"))
            await until(lambda: ready(api, "a"), ("True", "Parked"))
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            status = (await api.get("loraadapters", "a"))["status"]
            assert status["loaded"] == "1/1"
            assert [(item["pod"], item["bootID"], item["tier"]) for item in status["replicas"]] == [
                ("tiny-0", "boot-1", "device")
            ]
            await api.delete("pods", "tiny-0")
            await until(lambda: loaded(api, "a"), ("False", "RuntimeRestarted"), every_s=0.02)
            status = (await api.get("loraadapters", "a"))["status"]
            assert (status["loaded"], status["replicas"]) == ("0/1", [])
            assert await ready(api, "a") == ("True", "Parked")


async def test_a_terminating_pod_does_not_count_though_it_still_answers(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            await api.delete("pods", "tiny-0", grace_s=30)
            await until(lambda: loaded(api, "a"), ("False", "RuntimeRestarted"))
            assert await api.find("pods", "tiny-0")


async def test_a_new_process_in_the_same_pod_takes_loaded_away(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            runtime.adapters.clear()
            runtime.boot_id = "boot-2"
            runtime.change()
            await until(lambda: loaded(api, "a"), ("False", "Parked"))


async def test_a_runtime_that_does_not_answer_no_longer_counts_as_having_the_adapter(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
        await until(lambda: loaded(api, "a"), ("Unknown", "Unavailable"))
        await until(lambda: base_ready(api), ("False", "Starting"))


async def test_a_runtimes_failure_to_load_becomes_the_adapters_failure(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        key = key_of(adapter)
        await until(lambda: ready(api, "a"), ("True", "Parked"))  # a failure from before the inspection would not count
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key, f"{api.namespace}/a")
            detail = ErrorDetail(reason="NonFiniteWeights", message="lora_A holds NaN; train again")
            failed = {"state": AdapterState.FAILED, "tier": Tier.DISK, "failure": detail}
            runtime.reports[key] = {**failed, "since_unix_s": time.time()}
            runtime.change()
            await until(lambda: ready(api, "a"), ("False", "NonFiniteWeights"))
            item = await api.get("loraadapters", "a")
            assert condition(item, "Compatible") == ("False", "NonFiniteWeights")
            assert condition(item, "Resolved") == ("True", "Resolved")
            await api.delete("pods", "tiny-0")
            await asyncio.sleep(0.5)
            assert await ready(api, "a") == ("False", "NonFiniteWeights")


async def test_the_modules_that_the_first_runtime_reports_are_kept_and_adapters_checked_against_them(
    api: Api, tmp_path: Path
) -> None:
    inspector = FakeInspector()
    modules = compact([BaseModule("model.layers.0.self_attn.q_proj", 8, 8)], digest("base"))

    async def compatible() -> tuple[str, str]:
        return condition(await api.get("loraadapters", "a"), "Compatible")

    async with running_operator(api, tmp_path, inspector):
        base = await api.base()
        await api.adapter("a")
        await until(compatible, ("Unknown", "NotChecked"))
        assert await ready(api, "a") == ("True", "Parked")
        async with ScriptedRuntime(token=token_of(base), modules=modules).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(compatible, ("True", "Compatible"))
        status = (await api.get("basemodels", "tiny"))["status"]
        assert BaseModules.model_validate(status["modules"]) == modules
        assert [facts and set(facts.modules) for facts in inspector.against] == [
            None,
            {"model.layers.0.self_attn.q_proj"},
        ]
        await api.adapter("b")  # no runtime is asked again: the status has the list
        await until(lambda: ready(api, "b"), ("True", "Parked"))
        assert inspector.against[-1] is not None


async def test_a_pvc_source_awaits_a_runtime_which_then_inspects_it(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        await api.adapter("a", source={"uri": "pvc://models/a"})
        await until(lambda: ready(api, "a"), ("True", "Unverified"))
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            runtime.resolve_answer = ResolveAnswer(digest=digest("p"), rank=4, target_modules=["q_proj"], size_bytes=9)
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: ready(api, "a"), ("True", "Parked"))
            assert (await api.get("loraadapters", "a"))["status"]["digest"] == digest("p")


async def test_a_warm_adapter_is_registered_and_pinned_on_its_preferred_replica(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: base_ready(api), ("True", "Ready"))
            adapter = await api.adapter("a", minReplicas=1)
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            descriptor = runtime.adapters[key_of(adapter)].descriptor
            assert descriptor.pinned
            assert descriptor.display == f"{api.namespace}/a"
            await api.patch("loraadapters", "a", {"spec": {"minReplicas": 0}})

            async def unpinned() -> bool:
                return not runtime.adapters[key_of(adapter)].descriptor.pinned

            await until(unpinned)


async def test_a_deleted_adapter_leaves_its_runtime(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            await api.delete("loraadapters", "a")

            async def gone() -> bool:
                return not runtime.adapters

            await until(gone)


async def test_an_adapter_that_a_runtime_has_without_an_object_is_unregistered_after_a_while(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_operator.decisions.plan_base.STRAY_GRACE_S", 1.0)
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            runtime.have(AdapterKey("00000000-dead", digest("x")), f"{api.namespace}/long-gone")
            await api.runtime_pod(base, "tiny-0", runtime.port)

            async def gone() -> bool:
                return not runtime.adapters

            await until(gone)


async def test_a_changed_source_is_loaded_next_to_the_old_one_before_it_replaces_it(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        adapter = await api.adapter("a")
        old, new = key_of(adapter), key_of(adapter, "hf://org/a2")
        async with ScriptedRuntime(token=token_of(base), load_s=1.0).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(old, f"{api.namespace}/a")
            await until(lambda: loaded(api, "a"), ("True", "Loaded"))
            await api.patch("loraadapters", "a", {"spec": {"source": {"uri": "hf://org/a2"}}})

            async def progressing() -> tuple[str, str]:
                return condition(await api.get("loraadapters", "a"), "Progressing")

            await until(progressing, ("True", "Loading"), every_s=0.02)
            status = (await api.get("loraadapters", "a"))["status"]
            assert (status["digest"], status["sourceUri"]) == (old.digest, "hf://org/a")
            assert await ready(api, "a") == ("True", "Loaded")

            async def served() -> str:
                return str((await api.get("loraadapters", "a"))["status"]["digest"])

            await until(served, new.digest)
            assert await ready(api, "a") == ("True", "Loaded")

            async def alone() -> bool:
                return list(runtime.adapters) == [new]

            await until(alone)
            assert runtime.adapters[new].descriptor.source.uri == "hf://org/a2"


async def test_when_the_new_files_fail_the_old_keep_serving(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector(
        {"hf://org/a2": SourceFailure(FailureReason.INCOMPATIBLE, "lora_B is missing; upload again")}
    )
    async with running_operator(api, tmp_path, inspector):
        await api.base()
        await api.adapter("a")
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        await api.patch("loraadapters", "a", {"spec": {"source": {"uri": "hf://org/a2"}}})

        async def progressing() -> tuple[str, str]:
            return condition(await api.get("loraadapters", "a"), "Progressing")

        await until(progressing, ("False", "RolloutFailed"))
        item = await api.get("loraadapters", "a")
        assert condition(item, "Ready") == ("True", "Parked")
        assert item["status"]["digest"] == digest("hf://org/a")
        assert item["status"]["failure"]["reason"] == "Incompatible"
        await api.patch("loraadapters", "a", {"spec": {"source": {"uri": "hf://org/a3"}}})
        await until(progressing, ("False", "Stable"))
        assert (await api.get("loraadapters", "a"))["status"]["digest"] == digest("hf://org/a3")


async def test_usage_stays_exact_over_an_operators_restart_and_a_pods_loss(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector()
    base = await api.base()
    adapter = await api.adapter("a")
    uid = adapter["metadata"]["uid"]

    async def tokens() -> int:
        return int(
            ((await api.get("loraadapters", "a")).get("status") or {}).get("usage", {}).get("completionTokens", 0)
        )

    async with ScriptedRuntime(token=token_of(base)).running() as runtime:
        await api.runtime_pod(base, "tiny-0", runtime.port)
        async with running_operator(api, tmp_path, inspector):
            await until(lambda: ready(api, "a"), ("True", "Parked"))
            runtime.parts[uid] = UsagePart(boot_id="boot-1", requests=3, completion_tokens=100, loads=1)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            await until(tokens, 100)
        runtime.parts[uid] = UsagePart(boot_id="boot-1", requests=5, completion_tokens=150, loads=1)
        runtime.change()
        async with running_operator(api, tmp_path, inspector):
            await until(tokens, 150)
            runtime.parts[uid] = UsagePart(boot_id="boot-1", requests=6, completion_tokens=170, loads=1)
            runtime.change()
            await asyncio.sleep(0.5)  # polled, perhaps not written yet
            await api.delete("pods", "tiny-0")
            await until(tokens, 170)
            usage = (await api.get("loraadapters", "a"))["status"]["usage"]
            assert (usage["requests"], usage["loads"]) == (6, 1)

            async def parts() -> int:
                return len((await api.get("loraadapters", "a"))["status"]["usage"]["parts"])

            await until(parts, 0)
        async with running_operator(api, tmp_path, inspector):
            await asyncio.sleep(1.0)
            assert await tokens() == 170


async def test_an_idle_base_scales_to_zero_and_a_wake_up_starts_it_again(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base(scaling={"idleAfter": "2s"})
        adapter = await api.adapter("a")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            runtime.have(key_of(adapter), f"{api.namespace}/a")
            runtime.load = {"in_flight": 1, "last_request_unix_s": time.time()}
            runtime.change()
            await until(lambda: base_ready(api), ("True", "Ready"))
            await asyncio.sleep(3.0)
            assert (await api.get("basemodels", "tiny"))["spec"].get("replicas", 1) == 1  # in flight: never idle
            runtime.load = {"in_flight": 0, "last_request_unix_s": time.time()}
            runtime.change()

            async def replicas() -> int:
                deployment = await api.find("deployments", "tiny-runtime")
                return int(deployment["spec"]["replicas"]) if deployment else -1

            await until(replicas, 0)
            await api.delete("pods", "tiny-0")  # no controller here does it
        await until(lambda: base_ready(api), ("True", "ScaledToZero"))
        await until(lambda: loaded(api, "a"), ("False", "Parked"))
        assert await ready(api, "a") == ("True", "Parked")
        await api.patch("basemodels", "tiny", {"spec": {"replicas": 1}}, sub="scale")
        await until(replicas, 1)
        await asyncio.sleep(3.0)  # longer than idleAfter, but it is only starting
        assert await replicas() == 1
        assert await base_ready(api) == ("False", "Starting")


async def test_load_above_the_target_adds_replicas_up_to_the_bound(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base(scaling={"targetInFlight": 4, "maxReplicas": 3})
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            runtime.load = {"in_flight": 5, "waiting": 20, "last_request_unix_s": time.time()}
            await api.runtime_pod(base, "tiny-0", runtime.port)

            async def replicas() -> int:
                return int((await api.get("basemodels", "tiny"))["spec"].get("replicas", -1))

            await until(replicas, 3)


async def test_another_namespace_needs_the_owners_grant_and_loses_it_at_once(api: Api, tmp_path: Path) -> None:
    other = f"{api.namespace}-b"
    await api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})

    async def there() -> tuple[str, str]:
        return condition(await api.get("loraadapters", "guest", namespace=other), "Ready")

    namespaces = frozenset({api.namespace, other})
    async with running_operator(api, tmp_path, FakeInspector(), namespaces=namespaces):
        await api.base()
        await api.adapter("guest", namespace=other, base_namespace=api.namespace)
        await until(there, ("False", "NotPermitted"))
        await api.patch("basemodels", "tiny", {"spec": {"access": {"namespaces": [other]}}})
        await until(there, ("True", "Parked"))
        await api.patch("basemodels", "tiny", {"spec": {"access": {"namespaces": []}}})
        await until(there, ("False", "NotPermitted"))


async def test_a_base_whose_profile_does_not_exist_says_so(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base(runtimeProfile="gpu")
        await until(lambda: base_ready(api), ("False", "ProfileNotFound"))
        assert await api.find("deployments", "tiny-runtime") is None


async def test_a_base_that_cannot_be_found_starts_no_pod(api: Api, tmp_path: Path) -> None:
    inspector = FakeInspector({"hf://org/tiny": ArtifactError(FailureReason.SOURCE_NOT_FOUND, "404; correct the uri")})
    async with running_operator(api, tmp_path, inspector):
        await api.base()
        await api.adapter("a")
        await until(lambda: base_ready(api), ("False", "SourceNotFound"))

        async def replicas() -> int:
            deployment = await api.find("deployments", "tiny-runtime")
            return int(deployment["spec"]["replicas"]) if deployment else 0

        await until(lambda: replicas(), 0)


async def test_a_deployment_that_someone_deletes_is_created_again(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=600.0):  # only the watch event can cause it
        await api.base()
        uid = (await until(lambda: api.find("deployments", "tiny-runtime")))["metadata"]["uid"]
        await api.delete("deployments", "tiny-runtime")

        async def another() -> bool:
            deployment = await api.find("deployments", "tiny-runtime")
            return deployment is not None and deployment["metadata"]["uid"] != uid

        await until(another)


async def test_children_that_someone_changes_or_deletes_are_restored_by_the_resync(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=1.0):
        await api.base()
        await until(lambda: api.find("poddisruptionbudgets", "tiny-runtime"))  # it is the last child to be applied

        async def image() -> str:
            deployment = await api.get("deployments", "tiny-runtime")
            return str(deployment["spec"]["template"]["spec"]["containers"][0]["image"])

        async def service_exists() -> bool:
            return await api.find("services", "tiny-runtime") is not None

        assert await image() == "registry.example/runtime:1"
        container = {"name": "runtime", "image": "registry.example/other:1"}
        change = {"spec": {"template": {"spec": {"containers": [container]}}}}
        await api.patch("deployments", "tiny-runtime", change)
        await until(image, "registry.example/runtime:1")
        await api.delete("services", "tiny-runtime")  # Services are not watched
        await until(service_exists)


async def test_a_rotated_token_reaches_the_runtimes_without_a_rollout(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=0.5):
        base = await api.base()
        old = token_of(base)
        new = runtime_token("n" * 64, base["metadata"]["uid"])

        async def hashes() -> list[str]:
            found = await api.find("configmaps", "tiny-runtime")
            return found["data"]["sha256"].split() if found else []

        await until(hashes, [token_sha256(old)])
        before = await until(lambda: api.find("deployments", "tiny-runtime"))
        async with ScriptedRuntime(token=old).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: base_ready(api), ("True", "Ready"))
            (tmp_path / "token").write_text(f"{'n' * 64}\n{MASTER_TOKEN}\n")
            await until(hashes, [token_sha256(new), token_sha256(old)])
            polled = runtime.polls
            await until(lambda: polls_after(runtime, polled))
            assert await base_ready(api) == ("True", "Ready"), "a runtime that has not read the new hash yet"
            runtime.token = new
            (tmp_path / "token").write_text(f"{'n' * 64}\n")
            await until(hashes, [token_sha256(new)])
            polled = runtime.polls
            await until(lambda: polls_after(runtime, polled))
            assert await base_ready(api) == ("True", "Ready")
        after = await api.get("deployments", "tiny-runtime")
        assert after["spec"]["template"] == before["spec"]["template"]


async def polls_after(runtime: ScriptedRuntime, before: int) -> bool:
    """True once the runtime has answered two more polls."""
    return runtime.polls > before + 1


async def test_an_object_of_others_with_the_name_of_a_child_is_left_alone(api: Api, tmp_path: Path) -> None:
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "tiny-runtime"}, "spec": {"ports": [{"port": 1}]},
    }  # fmt: skip
    await api.create("services", service)
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base()
        await until(lambda: base_ready(api), ("False", "NameConflict"))
        assert (await api.get("services", "tiny-runtime"))["spec"]["ports"][0]["port"] == 1


async def test_an_external_autoscalers_number_stays_and_runs_no_more_pods_than_allowed(
    api: Api, tmp_path: Path
) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=0.5):
        base = await api.base(scaling={"mode": "External", "maxReplicas": 2, "scaleDownDelay": "0s"})
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: base_ready(api), ("True", "Ready"))
            await api.patch("basemodels", "tiny", {"spec": {"replicas": 3}}, sub="scale")

            async def pods_wanted() -> int:
                return int((await api.get("deployments", "tiny-runtime"))["spec"]["replicas"])

            await until(pods_wanted, 2)
            await asyncio.sleep(2.0)  # several resyncs
            assert (await api.get("basemodels", "tiny"))["spec"]["replicas"] == 3


async def test_the_emptier_pod_is_marked_before_the_number_of_replicas_is_lowered(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base(scaling={"maxReplicas": 2, "scaleDownDelay": "0s"})
        token = token_of(base)
        async with ScriptedRuntime(token=token).running() as busy, ScriptedRuntime(token=token).running() as empty:
            busy.load = {"in_flight": 20, "last_request_unix_s": time.time()}
            await api.runtime_pod(base, "tiny-0", busy.port)

            async def replicas() -> int:
                return int((await api.get("basemodels", "tiny"))["spec"].get("replicas", -1))

            await until(replicas, 2)
            await api.runtime_pod(base, "tiny-1", empty.port)
            busy.load = {"in_flight": 1, "last_request_unix_s": time.time()}
            busy.change()
            await until(replicas, 1)
            costs = {
                pod["metadata"]["name"]: pod["metadata"].get("annotations", {}).get(ANNOTATION_DELETION_COST)
                for pod in await api.items("pods")
            }
            assert costs == {"tiny-0": None, "tiny-1": "-1"}


async def test_a_hot_adapter_spreads_over_the_replicas_and_a_restart_of_the_operator_changes_nothing(
    api: Api, tmp_path: Path
) -> None:
    base = await api.base(scaling={"minReplicas": 2, "maxReplicas": 2, "targetInFlight": 4})
    hot, token = await api.adapter("hot"), token_of(base)
    key = key_of(hot)

    async def placement() -> dict[str, Any]:
        return ((await api.get("loraadapters", "hot")).get("status") or {}).get("placement") or {}

    async with ScriptedRuntime(token=token).running() as one, ScriptedRuntime(token=token).running() as two:
        async with running_operator(api, tmp_path, FakeInspector(), usage_interval_s=60.0):
            await until(lambda: ready(api, "hot"), ("True", "Parked"))
            for runtime in (one, two):
                runtime.have(key, f"{api.namespace}/hot")
                runtime.reports[key] = {"in_flight": 1}
            two.adapters.clear()
            await api.runtime_pod(base, "tiny-0", one.port)
            await api.runtime_pod(base, "tiny-1", two.port)
            await until(lambda: loaded(api, "hot"), ("True", "Loaded"))
            assert await placement() == {}
            one.reports[key] = {"in_flight": 8}
            one.change()
            found = await until(placement)
            assert (found["k"], sorted(found["replicas"])) == (2, ["tiny-0", "tiny-1"])
            assert "8 requests" in found["why"]

            async def on_both() -> bool:
                return bool((await api.get("loraadapters", "hot"))["status"]["loadedReplicas"] == 2)

            await until(on_both)
            assert two.adapters[key].descriptor.load
        version = (await api.get("loraadapters", "hot"))["metadata"]["resourceVersion"]
        async with running_operator(api, tmp_path, FakeInspector(), usage_interval_s=60.0):
            await asyncio.sleep(2.0)
            assert await placement() == found
            assert (await api.get("loraadapters", "hot"))["metadata"]["resourceVersion"] == version

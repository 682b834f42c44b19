"""The operator against a real API server: what an object says of a failure, and what happens next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import operator_world
import pytest
from fakes_operator import FakeInspector, ScriptedRuntime
from operator_world import Api, condition, labels_of, running_operator, token_of, until

from lorapool_operator.world.cluster_cache import AdapterObject

pytestmark = pytest.mark.apiserver

PULL = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}


async def base_condition(api: Api, kind: str) -> tuple[str, str]:
    return condition(await api.get("basemodels", "tiny"), kind)


async def message(api: Api, kind: str, plural: str = "basemodels", name: str = "tiny") -> str:
    conditions = (await api.get(plural, name))["status"]["conditions"]
    return str(next(item["message"] for item in conditions if item["type"] == kind))


async def warned(api: Api, reason: str) -> bool:
    return any((item["type"], item["reason"]) == ("Warning", reason) for item in await api.items("events"))


async def failing_pod(api: Api, base: dict[str, Any], state: dict[str, Any]) -> None:
    metadata = {"name": "tiny-0", "labels": labels_of(base), **await api.owners(base)}
    container = {"name": "runtime", "image": "none", "ports": [{"name": "http", "containerPort": 1}]}
    spec = {"containers": [container], "automountServiceAccountToken": False, "nodeName": "nowhere"}
    await api.create("pods", {"metadata": metadata, "spec": spec})
    status = {"phase": "Pending", "containerStatuses": [
        {"name": "runtime", "image": "none", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    ]}  # fmt: skip
    await api.patch("pods", "tiny-0", {"status": status}, sub="status")


async def test_a_base_that_cannot_start_stays_not_ready_through_scale_down_and_a_restart_of_the_operator(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorapool_operator.decisions.scaling.starts.allowance_s", lambda *_: 3.0)
    settings = {"start_retry_min_s": 3600.0, "start_retry_max_s": 3600.0}
    async with running_operator(api, tmp_path, FakeInspector(), **settings):
        base = await api.base()
        await api.adapter("a")
        await failing_pod(api, base, PULL)
        await until(lambda: base_condition(api, "Ready"), ("False", "ImagePullFailed"))
        await until(lambda: ready(api, "a"), ("False", "BaseNotReady"))

        async def stopped() -> bool:
            return bool((await api.get("basemodels", "tiny"))["spec"].get("replicas") == 0)

        await until(stopped)
        await api.delete("pods", "tiny-0")
        await until(lambda: base_condition(api, "Stalled"), ("True", "ImagePullFailed"))
    async with running_operator(api, tmp_path, FakeInspector(), **settings):
        await api.adapter("b")
        await until(lambda: ready(api, "b"), ("False", "BaseNotReady"))
        item = await api.get("basemodels", "tiny")
        assert condition(item, "Ready") == ("False", "ImagePullFailed")
        assert item["status"]["start"]["failures"] == 1
        assert item["spec"]["replicas"] == 0
        (tmp_path / "profiles.yaml").write_text("profiles:\n  default: {image: corrected}\n")

        async def started_again() -> bool:
            return bool((await api.get("basemodels", "tiny"))["spec"].get("replicas") == 1)

        await until(started_again)
        assert await base_condition(api, "Ready") == ("False", "ImagePullFailed")
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-1", runtime.port)
            await until(lambda: base_condition(api, "Ready"), ("True", "Ready"))
            await until(lambda: ready(api, "a"), ("True", "Parked"))
            assert "start" not in (await api.get("basemodels", "tiny"))["status"]


async def ready(api: Api, name: str) -> tuple[str, str]:
    return condition(await api.get("loraadapters", name), "Ready")


async def test_an_invalid_profile_is_reported_in_the_words_of_the_api_server_and_heals(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invalid = "profiles:\n  default: {resources: {requests: {memory: 16GB}}}\n"
    monkeypatch.setattr(operator_world, "PROFILES", invalid)
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=600.0):
        await api.base()
        await until(lambda: base_condition(api, "Ready"), ("False", "InvalidProfile"))
        assert "quantities must match" in await message(api, "Ready")
        assert await base_condition(api, "Stalled") == ("True", "InvalidProfile")
        await until(lambda: warned(api, "InvalidProfile"))
        (tmp_path / "profiles.yaml").write_text("profiles:\n  default: {resources: {requests: {memory: 16Gi}}}\n")
        await until(lambda: base_condition(api, "Ready"), ("False", "Starting"))
        assert await base_condition(api, "Stalled") == ("", "")


async def test_profiles_that_cannot_be_read_are_shown_by_every_base_and_the_old_ones_stay_in_force(
    api: Api, tmp_path: Path
) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=600.0):
        await api.base()
        await until(lambda: base_condition(api, "Ready"), ("False", "Starting"))
        (tmp_path / "profiles.yaml").write_text("profiles:\n  default: {resource: {}}\n")
        await until(lambda: base_condition(api, "Stalled"), ("True", "ProfilesUnreadable"))
        text = await message(api, "Stalled")
        assert "profiles.default.resource: Extra inputs are not permitted" in text
        assert "Correct the chart's value runtimeProfiles" in text
        await until(lambda: warned(api, "ProfilesUnreadable"))
        await api.base("later")  # is started with the old profiles
        await until(lambda: api.find("deployments", "later-runtime"))
        (tmp_path / "profiles.yaml").write_text(operator_world.PROFILES)
        await until(lambda: base_condition(api, "Stalled"), ("", ""))


async def test_a_quota_that_refuses_the_deployment_is_reported(api: Api, tmp_path: Path) -> None:
    hard = {"count/deployments.apps": "0"}
    path = f"/api/v1/namespaces/{api.namespace}/resourcequotas"
    await api.call("POST", path, {"metadata": {"name": "none"}, "spec": {"hard": hard}})
    status = {"status": {"hard": hard, "used": {"count/deployments.apps": "0"}}}  # no controller does it here
    await api.call("PATCH", f"{path}/none/status", status, content="application/merge-patch+json")
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base()
        await until(lambda: base_condition(api, "Ready"), ("False", "QuotaExceeded"))
        assert "exceeded quota: none" in await message(api, "Ready")
        await until(lambda: warned(api, "QuotaExceeded"))


async def test_an_edit_to_an_unknown_profile_and_its_repair_are_seen(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector(), resync_s=600.0):
        base = await api.base()
        async with ScriptedRuntime(token=token_of(base)).running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: base_condition(api, "Ready"), ("True", "Ready"))
            await api.patch("basemodels", "tiny", {"spec": {"runtimeProfile": "large"}})
            await until(lambda: base_condition(api, "Progressing"), ("False", "ProfileNotFound"))
            assert await base_condition(api, "Ready") == ("True", "Degraded")
            await until(lambda: warned(api, "ProfileNotFound"))
            profiles = "profiles:\n  default: {}\n  large: {resources: {requests: {cpu: 200m}}}\n"
            (tmp_path / "profiles.yaml").write_text(profiles)
            await until(lambda: base_condition(api, "Ready"), ("True", "Ready"))
            (tmp_path / "profiles.yaml").write_text(profiles.replace("200m", "300m"))

            async def noticed() -> bool:
                return "ProfileChanged" in {item["reason"] for item in await api.items("events")}

            await until(noticed)
            deployment = await api.get("deployments", "tiny-runtime")
            container = deployment["spec"]["template"]["spec"]["containers"][0]
            assert container["resources"]["requests"]["cpu"] == "300m"


async def test_an_object_that_cannot_be_parsed_says_so(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = AdapterObject.parse

    def older(raw: dict[str, Any]) -> AdapterObject:
        if raw["spec"].get("alias") == "of-a-newer-version":
            return parse({**raw, "spec": {**raw["spec"], "alias": {"names": ["of", "a", "newer", "version"]}}})
        return parse(raw)

    monkeypatch.setattr(AdapterObject, "parse", older)
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base()
        await api.adapter("a", alias="of-a-newer-version")
        await until(lambda: ready(api, "a"), ("False", "Unreadable"))
        item = await api.get("loraadapters", "a")
        assert condition(item, "Stalled") == ("True", "Unreadable")
        assert await message(api, "Ready", "loraadapters", "a") == (
            "This version of the operator cannot read the object: spec.alias: Input should be a valid string. Correct "
            "the field, or upgrade the operator; nothing was changed."
        )
        await until(lambda: warned(api, "Unreadable"))
        await api.patch("loraadapters", "a", {"spec": {"alias": "plain"}})
        await until(lambda: ready(api, "a"), ("True", "Parked"))
        assert condition(await api.get("loraadapters", "a"), "Stalled") == ("", "")


async def test_a_runtime_that_refuses_the_operators_token_is_reported(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        base = await api.base()
        async with ScriptedRuntime(token="another token").running() as runtime:
            await api.runtime_pod(base, "tiny-0", runtime.port)
            await until(lambda: base_condition(api, "RuntimeAvailable"), ("False", "TokenRefused"))
            assert "Pod tiny-0" in await message(api, "Ready")
            await until(lambda: warned(api, "TokenRefused"))

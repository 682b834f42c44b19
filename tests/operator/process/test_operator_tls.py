"""The operator's polls and calls over TLS, and the pods that it makes for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from authority_kit import Tls, authority, serve_with
from base_world import IMAGE, base, condition, deployment, message, plan, pod, runtime, world
from fakes_operator import ScriptedRuntime, digest
from pods import adopt, pod_object

from lorapool_api.common import AdapterKey
from lorapool_api.pod_address import ENCRYPTED
from lorapool_api.protocol import AdapterDescriptor, runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_api.trust.tls import ReleaseTrust, ServerCertificate
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.manifests import children, template_hash
from lorapool_operator.effects.runtime_polls import PollSettings, RuntimeGoneError, RuntimeTracker
from lorapool_operator.world.cluster_cache import ClusterCache, PodObject
from lorapool_operator.world.profiles import RuntimeProfile
from lorapool_runtime.settings import read_settings

MASTER = "m" * 64
FAST = PollSettings(wait_s=0.2, pause_s=0.0, stale_s=0.0, timeout_s=5.0)
DESCRIPTOR = AdapterDescriptor.model_validate({"display": "team/a", "source": {"uri": "hf://org/a"}})


@asynccontextmanager
async def polling(port: int, trust: ReleaseTrust, scheme: str = ENCRYPTED) -> AsyncIterator[RuntimeTracker]:
    """Polls one pod of the base `team/tiny`."""
    cache = ClusterCache()
    cache.bases.put(base())
    tokens = RuntimeTokens([MASTER]).of
    tracker = RuntimeTracker(cache, tokens=tokens, settings=FAST, changed=lambda *_, **__: None, trust=trust)
    adopt(cache, replace(pod(), ip="127.0.0.1", port=port, scheme=scheme))
    tracker.follow_pods()
    await tracker.answered(10.0)
    yield tracker
    await tracker.close()


def runtime_with(certificate: ServerCertificate | None) -> ScriptedRuntime:
    return ScriptedRuntime(token=runtime_token(MASTER, "base-uid"), tls=certificate.context if certificate else None)


async def test_a_runtime_is_polled_and_called_over_tls(tmp_path: Path) -> None:
    tls = Tls(tmp_path)
    async with runtime_with(tls.server("base-uid")).running() as served, polling(served.port, tls.trust()) as tracker:
        [view] = tracker.views_of(base())
        assert view.snapshot is not None
        await tracker.register("pod-uid", AdapterKey("a-uid", digest("a")), DESCRIPTOR)
        assert served.puts == [AdapterKey("a-uid", digest("a"))]


async def test_a_pod_that_serves_without_tls_is_polled_as_before(tmp_path: Path) -> None:
    async with (
        runtime_with(None).running() as served,
        polling(served.port, Tls(tmp_path).trust(), "http") as tracker,
    ):
        assert tracker.views_of(base())[0].snapshot is not None


@pytest.mark.parametrize(
    ("case", "check"),
    [("expired", "has expired"), ("other base", "not one of this base"), ("other authority", "not signed by")],
)
async def test_a_refused_certificate_is_logged_once_and_shown_with_the_check_that_failed(
    tmp_path: Path, case: str, check: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    tls = Tls(tmp_path)
    certificate = {
        "expired": lambda: tls.server("base-uid", age_days=100),
        "other base": lambda: tls.server("other-uid"),
        "other authority": lambda: ServerCertificate(serve_with(tmp_path / "x", authority(tmp_path / "y"), "base-uid")),
    }[case]()
    async with runtime_with(certificate).running() as served, polling(served.port, tls.trust()) as tracker:
        while tracker.poll_failures < 2:  # noqa: ASYNC110  it has no event of its own
            await asyncio.sleep(0.005)
        [view] = tracker.views_of(base())
        assert view.snapshot is None
        assert check in view.distrust
        with pytest.raises(RuntimeGoneError):
            await tracker.register("pod-uid", AdapterKey("a-uid", digest("a")), DESCRIPTOR)
        assert served.authorizations == []
    [record] = [item for item in caplog.records if item.name.startswith("lorapool")]
    assert (record.base, record.replica, check in record.error) == ("team/tiny", "pod", True)  # type: ignore[attr-defined]


def test_a_refused_certificate_is_a_condition() -> None:
    refused = replace(runtime(fresh=False), snapshot=None, distrust="The runtime's certificate is refused: expired.")
    made = plan(world(base(replicas=1), pods=(pod(),), runtimes=(refused,), workload=deployment()))
    assert condition(made, "RuntimeAvailable") == ("False", "CertificateRefused")
    assert "Pod pod: The runtime's certificate is refused" in message(made, "Ready")


def made_with(tls: bool, profile: RuntimeProfile | None = None) -> list[dict[str, Any]]:
    rules = SourceRules(owner="team")
    return children(
        base(), profile or RuntimeProfile(), IMAGE, replicas=1, token_sha256=("ab" * 32,), rules=rules, tls=tls
    )


def test_a_pod_with_tls_says_so_by_its_port_and_mounts_the_key_of_its_own_base_alone() -> None:
    _, made, service, _ = made_with(tls=True)
    spec = made["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert [port["name"] for port in container["ports"]] == ["https", "metrics"]
    assert next((port["name"], port["targetPort"]) for port in service["spec"]["ports"]) == ("https", "https")
    [volume] = [item["secret"] for item in spec["volumes"] if "secret" in item]
    assert volume["secretName"] == "lorapool-runtime-tls"
    assert volume["items"] == [
        {"key": "base-uid.crt", "path": "tls.crt"},
        {"key": "base-uid.key", "path": "tls.key"},
    ]
    env = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    folder = read_settings([], env).tls_dir
    assert {"name": "runtime-tls", "mountPath": str(folder), "readOnly": True} in container["volumeMounts"]
    parsed = PodObject.parse({**pod_object(1), "spec": spec})
    assert (parsed.scheme, parsed.port) == ("https", 8000)
    probes = {container[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"metrics"}
    assert "scheme" not in container["livenessProbe"]["httpGet"]


def test_without_tls_pods_are_as_they_were_and_a_change_replaces_them() -> None:
    plain, encrypted = made_with(tls=False), made_with(tls=True)
    spec = plain[1]["spec"]["template"]["spec"]
    assert [port["name"] for port in spec["containers"][0]["ports"]] == ["http", "metrics"]
    assert not [item for item in spec["volumes"] if "secret" in item]
    assert template_hash(plain) != template_hash(encrypted)


def test_a_plan_makes_pods_with_tls_where_the_release_has_it() -> None:
    found = {}
    for tls in (False, True):
        made = plan(world(base(replicas=1), serves_tls=tls))
        [template] = [child["spec"]["template"] for child in made.children if child["kind"] == "Deployment"]
        found[tls] = template["spec"]["containers"][0]["ports"][0]["name"]
    assert found == {False: "http", True: "https"}

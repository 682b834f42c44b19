"""The whole gateway process against a real API server, with no more rights than the chart gives it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from apiserver import ApiServer, running_apiserver
from fakes import FakeRuntime, digest_of
from gateway_world import KEY, condition, until, until_it

from lorapool_api.protocol import runtime_token
from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_gateway import process
from lorapool_gateway.__main__ import serving_cluster
from lorapool_gateway.settings import Settings

pytestmark = pytest.mark.apiserver

MASTER = "m" * 64
KEYS_NAMESPACE = "lorapool-system"
PATIENCE_S = 30.0
"""Timeout of waits that take a fraction of a second on an idle machine."""
CRDS = Path(__file__).parent.parent.parent / "crds"

RIGHTS = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: gateway}
rules:
- {apiGroups: [lorapool.dev], resources: [basemodels, loraadapters], verbs: [list, watch]}
- {apiGroups: [lorapool.dev], resources: [basemodels/scale], verbs: [get, patch]}
- {apiGroups: [""], resources: [pods], verbs: [list, watch]}
- {apiGroups: [apps], resources: [replicasets, statefulsets, deployments], verbs: [list, watch]}
- {apiGroups: [leaderworkerset.x-k8s.io], resources: [leaderworkersets], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: gateway-keys, namespace: lorapool-system}
rules:
- {apiGroups: [""], resources: [secrets], verbs: [list, watch]}
- {apiGroups: [""], resources: [events], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: gateway}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: gateway}
subjects: [{kind: ServiceAccount, name: gateway, namespace: lorapool-system}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: gateway-keys, namespace: lorapool-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: gateway-keys}
subjects: [{kind: ServiceAccount, name: gateway, namespace: lorapool-system}]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("gateway")) as server:
        server.install_crds(*sorted(CRDS.glob("*.yaml")))
        server.kubectl("create", "namespace", KEYS_NAMESPACE)
        server.kubectl("create", "serviceaccount", "gateway", "-n", KEYS_NAMESPACE)
        server.kubectl("apply", "-f", "-", stdin=RIGHTS)
        yield server


@dataclass
class Cluster:
    """One namespace of the API server, with the actions of a user and of the control plane in it."""

    server: ApiServer
    namespace: str
    kubeconfig: Path
    names: dict[str, str] = field(default_factory=dict)

    def apply(self, *objects: dict[str, Any]) -> None:
        self.server.kubectl(
            "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        )

    def delete(self, *what: str, namespace: str | None = None) -> None:
        self.server.kubectl("delete", "-n", namespace or self.namespace, *what)

    def get(self, *what: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.server.kubectl("get", "-n", self.namespace, *what, "-o", "json"))
        return answer

    def key(self, text: str, name: str, namespaces: str = "*") -> None:
        data = {"keySha256": hashlib.sha256(text.encode()).hexdigest(), "namespaces": namespaces}
        encoded = {field: base64.b64encode(value.encode()).decode() for field, value in data.items()}
        metadata = {"name": name, "namespace": KEYS_NAMESPACE, "labels": {"lorapool.dev/api-key": "true"}}
        self.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": encoded})

    def base(self, name: str = "tiny", **spec: Any) -> str:
        """Creates the object; returns its uid."""
        self.apply(self._object("BaseModel", name, {"source": {"uri": "hf://org/tiny"}, **spec}))
        uid: str = self.get("basemodel", name)["metadata"]["uid"]
        return uid

    def adapter(self, *names: str) -> None:
        self.apply(*(self.adapter_object(name) for name in names))

    def adapter_object(self, name: str) -> dict[str, Any]:
        spec = {"baseModelRef": {"name": "tiny"}, "source": {"uri": f"hf://org/{name}"}}
        return self._object("LoraAdapter", name, spec)

    def make_ready(self, name: str) -> None:
        """Writes the status that the operator would write."""
        status = {
            "observedGeneration": 1,
            "digest": digest_of(name),
            "conditions": [condition("Ready", "True", "Parked")],
        }
        patch = json.dumps({"status": status})
        arguments = ("loraadapter", name, "--subresource=status", "--type=merge", "-p", patch)
        self.server.kubectl("patch", "-n", self.namespace, *arguments)

    def runtime(self, runtime: FakeRuntime, base_uid: str, *, ready: bool = True) -> None:
        """Writes what Kubernetes' controllers and a kubelet would write for a pod of the base."""
        labels = {"lorapool.dev/base": "tiny", "lorapool.dev/base-uid": base_uid}
        ports = [{"name": "http", "containerPort": runtime.port}]
        container = {"name": "runtime", "image": "none", "ports": ports}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
        spec = {"selector": {"matchLabels": labels}, "template": template}
        uid = self._owned(
            "apps/v1", "Deployment", "tiny-runtime", ("lorapool.dev/v1alpha1", "BaseModel", base_uid), spec
        )
        uid = self._owned("apps/v1", "ReplicaSet", "tiny-runtime-1", ("apps/v1", "Deployment", uid), spec)
        pod = {"containers": [container], "automountServiceAccountToken": False, "nodeName": "nowhere"}
        self._owned("v1", "Pod", "tiny-runtime-1", ("apps/v1", "ReplicaSet", uid), pod, labels)
        conditions = [{"type": "Ready", "status": str(ready)}]
        status = {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}], "conditions": conditions}
        arguments = ("--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
        self.server.kubectl("patch", "-n", self.namespace, "pod", "tiny-runtime-1", *arguments)

    def _owned(
        self,
        version: str,
        kind: str,
        name: str,
        owner: tuple[str, str, str],
        spec: dict[str, Any],
        *labels: dict[str, str],
    ) -> str:
        """Creates an object with a controller (API version, kind, uid); returns its uid."""
        reference = {**dict(zip(("apiVersion", "kind", "uid"), owner, strict=True)), "name": "any", "controller": True}
        metadata = {
            "name": name,
            "namespace": self.namespace,
            "labels": labels[0] if labels else spec["template"]["metadata"]["labels"],
            "ownerReferences": [reference],
        }
        self.apply({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})
        uid: str = self.get(kind, name)["metadata"]["uid"]
        return uid

    def _object(self, kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        metadata = {"name": name, "namespace": self.namespace}
        return {"apiVersion": "lorapool.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


@pytest.fixture
def here(cluster: ApiServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    namespace = f"ns-{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"
    cluster.kubectl("create", "namespace", namespace)
    cluster.kubectl("create", "serviceaccount", "default", "-n", namespace)  # no controller creates it here
    token = cluster.kubectl("create", "token", "gateway", "-n", KEYS_NAMESPACE).strip()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": cluster.url, "certificate-authority": str(cluster.ca_file)}}],
        "users": [{"name": "u", "user": {"token": token}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    made = Cluster(cluster, namespace, path)
    made.key(KEY, "key-main")
    yield made
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@asynccontextmanager
async def gateway(here: Cluster, **more: Any) -> AsyncIterator[Gateway]:
    values: dict[str, Any] = {"namespaces": here.namespace, "keys_namespace": KEYS_NAMESPACE, **more}
    settings = Settings(kubeconfig=here.kubeconfig, listen_host="127.0.0.1", api_port=0, metrics_port=0, **values)
    async with serving_cluster(settings, RuntimeTokens([MASTER])) as running, aiohttp.ClientSession() as session:
        yield Gateway(running, session)


@dataclass
class Gateway:
    running: process.GatewayProcess
    session: aiohttp.ClientSession

    async def ready(self) -> bool:
        async with self.session.get(f"http://127.0.0.1:{self.running.metrics_port}/readyz") as response:
            return response.status == 200

    async def becomes_ready(self) -> None:
        await until_it(self.ready, PATIENCE_S)

    async def metrics(self) -> str:
        async with self.session.get(f"http://127.0.0.1:{self.running.metrics_port}/metrics") as response:
            return await response.text()

    async def ask(self, model: str, key: str = KEY) -> tuple[int, str]:
        """Status and adapter header, or the error's code."""
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        url = f"http://127.0.0.1:{self.running.api_port}/v1/chat/completions"
        async with self.session.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as response:
            answer = await response.json()
            named = response.headers.get("x-lorapool-adapter", "")
            return response.status, named if response.status == 200 else answer["error"]["code"]

    async def models(self) -> list[str]:
        url = f"http://127.0.0.1:{self.running.api_port}/v1/models"
        async with self.session.get(url, headers={"Authorization": f"Bearer {KEY}"}) as response:
            return [model["id"] for model in (await response.json())["data"]]

    async def eventually(self, model: str, expected: tuple[int, str], **more: Any) -> None:
        async def answers_so() -> bool:
            return await self.ask(model, **more) == expected

        await until_it(answers_so, PATIENCE_S)


async def test_objects_secrets_and_pods_become_routes_and_vanish_with_them(here: Cluster) -> None:
    uid = here.base()
    here.adapter("route")
    here.make_ready("route")
    other = "lp-" + "x" * 43
    here.key(other, "key-other", here.namespace)
    async with FakeRuntime(token=runtime_token(MASTER, uid)).running() as runtime, gateway(here) as front:
        await front.becomes_ready()
        here.runtime(runtime, uid)
        name = f"{here.namespace}/route"
        await front.eventually("route", (200, f"{name}@{digest_of('route')}"))
        assert await front.ask("route", other) == (200, f"{name}@{digest_of('route')}")
        assert await front.models() == [f"{here.namespace}/tiny", name]
        assert f'adapter="{name}"' in await front.metrics()

        here.delete("secret", "key-other", namespace=KEYS_NAMESPACE)
        await front.eventually("route", (401, "invalid_api_key"), key=other)
        here.delete("loraadapter", "route")
        await front.eventually("route", (404, "model_not_found"))
        assert await front.models() == [f"{here.namespace}/tiny"]
        assert f'adapter="{name}"' not in await front.metrics()


async def test_a_malformed_key_gets_one_event_on_its_secret_whatever_the_number_of_gateways(here: Cluster) -> None:
    here.key("lp-" + "b" * 43, "key-broken", "Canary_Team")

    def events() -> list[dict[str, Any]]:
        text = here.server.kubectl("get", "events", "-n", KEYS_NAMESPACE, "-o", "json")
        return [item for item in json.loads(text)["items"] if item["involvedObject"]["name"] == "key-broken"]

    for _ in range(2):
        async with gateway(here) as front:
            await front.becomes_ready()
            await until(events, PATIENCE_S)
    [event] = events()
    here.delete("secret", "key-broken", namespace=KEYS_NAMESPACE)
    assert (event["type"], event["reason"], event["involvedObject"]["kind"]) == ("Warning", "InvalidApiKey", "Secret")
    assert "namespaces contains an invalid namespace name" in event["message"]
    assert "Canary" not in json.dumps(event)


async def test_a_request_to_a_sleeping_base_scales_it_once_through_the_scale_subresource(here: Cluster) -> None:
    uid = here.base(replicas=0)
    here.adapter("route")
    here.make_ready("route")
    async with FakeRuntime(token=runtime_token(MASTER, uid)).running() as runtime, gateway(here) as front:
        await front.becomes_ready()
        asking = [asyncio.create_task(front.ask("route")) for _ in range(50)]
        await until(lambda: here.get("basemodel", "tiny")["spec"].get("replicas") == 1, PATIENCE_S)
        assert here.get("basemodel", "tiny")["metadata"]["generation"] == 2
        runtime.ready = False
        here.runtime(runtime, uid, ready=False)
        await until(lambda: runtime.polls >= 1, PATIENCE_S)
        runtime.ready = True
        runtime.change()  # no controller says so: the runtime itself does
        assert set(await asyncio.gather(*asking)) == {(200, f"{here.namespace}/route@{digest_of('route')}")}
        assert 'wakes_total{base="' + here.namespace + '/tiny",result="woken"} 1.0' in await front.metrics()


async def test_with_the_api_server_down_everything_known_is_served_and_an_idle_adapter_still_loads(
    here: Cluster,
) -> None:
    uid = here.base()
    here.adapter("hot", "idle")
    here.make_ready("hot")
    here.make_ready("idle")
    async with FakeRuntime(token=runtime_token(MASTER, uid)).running() as runtime, gateway(here) as front:
        await front.becomes_ready()
        here.runtime(runtime, uid)
        await front.eventually("hot", (200, f"{here.namespace}/hot@{digest_of('hot')}"))
        here.server.interrupt()
        try:
            for _ in range(20):
                assert (await front.ask("hot"))[0] == 200
                await asyncio.sleep(0.02)
            assert await front.ask("idle") == (200, f"{here.namespace}/idle@{digest_of('idle')}")
            assert await front.ready()
            async with gateway(here) as restarted:
                assert not await restarted.ready()
                assert await restarted.ask("hot") == (503, "keys_unknown")
        finally:
            here.server.resume()
        await until(lambda: _answers(here), 60)
        here.adapter("after")
        here.make_ready("after")
        await front.eventually("after", (200, f"{here.namespace}/after@{digest_of('after')}"))


async def test_200_adapters_applied_at_once_are_listed_by_a_gateway_of_the_whole_cluster(here: Cluster) -> None:
    here.base()
    async with gateway(here, namespaces="*") as front:
        await front.becomes_ready()
        here.adapter(*(f"bulk-{number}" for number in range(200)))

        async def all_listed() -> bool:
            return sum(name.startswith(here.namespace) for name in await front.models()) == 201

        await until_it(all_listed, PATIENCE_S)


def test_the_gateway_was_never_refused(cluster: ApiServer) -> None:
    """Runs last: no call of this file exceeded the rights above, and no request caused a call."""
    user = f"system:serviceaccount:{KEYS_NAMESPACE}:gateway"
    events = [json.loads(line) for line in cluster.audit_log.read_text().splitlines()]
    own = [event for event in events if event["user"]["username"] == user and event.get("responseStatus")]
    assert own
    assert [event["requestURI"] for event in own if event["responseStatus"]["code"] in (401, 403)] == []


def _answers(here: Cluster) -> bool:
    try:
        here.get("basemodels")
    except AssertionError:
        return False
    return True

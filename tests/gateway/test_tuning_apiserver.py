"""Fine-tuning calls against a real API server, with no more rights than the gateway needs for them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from apiserver import ApiServer, running_apiserver
from gateway_world import KEY, until_it
from store_kit import StoreProcess, running_store

from lorapool_api.trust.runtime_tokens import RuntimeTokens
from lorapool_gateway.__main__ import serving_cluster
from lorapool_gateway.settings import Settings

pytestmark = pytest.mark.apiserver

A, KEYS = "team-a", "lorapool-keys"
CRDS = Path(__file__).parent.parent.parent / "crds"
RULES = [
    {"apiGroups": ["lorapool.dev"], "resources": ["basemodels"], "verbs": ["list", "watch"]},
    {"apiGroups": ["lorapool.dev"], "resources": ["loraadapters"], "verbs": ["list", "watch", "delete"]},
    {
        "apiGroups": ["lorapool.dev"],
        "resources": ["finetunejobs"],
        "verbs": ["get", "list", "watch", "create", "patch"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
    {"apiGroups": ["apps"], "resources": ["replicasets", "statefulsets", "deployments"], "verbs": ["list", "watch"]},
    {"apiGroups": ["leaderworkerset.x-k8s.io"], "resources": ["leaderworkersets"], "verbs": ["list", "watch"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["list", "watch"]},
]


def objects(*items: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def lorapool(kind: str, namespace: str, name: str, spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    found = {"name": name, "namespace": namespace, **metadata}
    return {"apiVersion": "lorapool.dev/v1alpha1", "kind": kind, "metadata": found, "spec": spec}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("tuning")) as server:
        server.install_crds(*sorted(CRDS.glob("*.yaml")))
        for namespace in (A, KEYS):
            server.kubectl("create", "namespace", namespace)
        server.kubectl("create", "serviceaccount", "gateway", "-n", KEYS)
        rbac, subject = "rbac.authorization.k8s.io", {"kind": "ServiceAccount", "name": "gateway", "namespace": KEYS}
        role = {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": "gateway"}, "rules": RULES}
        binding = {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "gateway"},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "gateway"},
            "subjects": [subject],
        }
        fields = {"keySha256": hashlib.sha256(KEY.encode()).hexdigest(), "namespaces": A, "fineTuning": "true"}
        key = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "key", "namespace": KEYS, "labels": {"lorapool.dev/api-key": "true"}},
            "data": {name: base64.b64encode(value.encode()).decode() for name, value in fields.items()},
        }
        base = lorapool("BaseModel", A, "tiny", {"source": {"uri": "hf://org/tiny"}, "fineTuning": {"enabled": True}})
        adapter = {"baseModelRef": {"name": "tiny"}, "source": {"uri": "store://team-a/adapters/one"}}
        made = {"annotations": {"lorapool.dev/tuned-by": "team-a/ftjob-one@uid"}}
        server.kubectl("apply", "-f", "-", stdin=objects(role, binding, key, base))
        server.kubectl("apply", "-f", "-", stdin=objects(lorapool("LoraAdapter", A, "one", adapter, **made)))
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    with running_store(tmp_path / "store") as made:
        yield made


@pytest.fixture
def settings(cluster: ApiServer, store: StoreProcess, tmp_path: Path) -> Settings:
    token = cluster.kubectl("create", "token", "gateway", "-n", KEYS).strip()
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
    return Settings(
        kubeconfig=path,
        namespaces=frozenset({A}),
        keys_namespace=KEYS,
        listen_host="127.0.0.1",
        api_port=0,
        metrics_port=0,
        store_url=store.url,
        store_token_file=store.folder / "token",
    )


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[openai.AsyncOpenAI]:
    """A gateway process' parts on real sockets, and the unmodified client of it."""
    async with serving_cluster(settings, RuntimeTokens(["m" * 64])) as running, aiohttp.ClientSession() as session:

        async def ready() -> bool:
            async with session.get(f"http://127.0.0.1:{running.metrics_port}/readyz") as response:
                return response.status == 200

        await until_it(ready, 60)
        url = f"http://127.0.0.1:{running.api_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            yield client


def jobs_of(cluster: ApiServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cluster.kubectl("get", "finetunejobs", "-n", A, "-o", "json"))["items"]
    return found


async def test_a_call_that_is_repeated_to_another_gateway_leaves_one_object(
    cluster: ApiServer, settings: Settings
) -> None:
    async with gateway(settings) as one, gateway(settings) as two:
        file = await one.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
        body = {"model": "tiny", "training_file": file.id, "suffix": "repeated"}
        ids = []
        for client, count in ((one, 0), (two, 1), (one, 2)):
            headers = {"x-stainless-retry-count": str(count)}
            answer = await client.post("/fine_tuning/jobs", body=body, cast_to=dict, options={"headers": headers})  # type: ignore[arg-type]
            ids.append(answer["id"])  # type: ignore[index]
        assert len(set(ids)) == 1
        assert [job["metadata"]["name"] for job in jobs_of(cluster)] == ids[:1]
        assert (await two.fine_tuning.jobs.retrieve(ids[0])).id == ids[0]
        assert (await two.fine_tuning.jobs.cancel(ids[0])).status == "cancelled"
        assert jobs_of(cluster)[0]["spec"]["run"] == "Cancelled"
        with pytest.raises(openai.BadRequestError) as caught:
            await one.fine_tuning.jobs.resume(ids[0])
        assert caught.value.code == "job_ended"
    async with gateway(settings) as restarted:
        headers = {"x-stainless-retry-count": "1"}
        answer = await restarted.post("/fine_tuning/jobs", body=body, cast_to=dict, options={"headers": headers})  # type: ignore[arg-type]
        assert answer["id"] == ids[0]  # type: ignore[index]
        assert [job.id async for job in restarted.fine_tuning.jobs.list()] == ids[:1]


async def test_a_rule_of_the_object_is_quoted_as_a_bad_request(cluster: ApiServer, settings: Settings) -> None:
    before = len(jobs_of(cluster))
    async with gateway(settings) as client:
        file = await client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
        extra = {"lorapool": {"promotion": "Gated"}}
        with pytest.raises(openai.BadRequestError, match="promotion") as caught:
            await client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body=extra)
        assert caught.value.code == "invalid_job"
    assert len(jobs_of(cluster)) == before


async def test_a_tuned_model_is_deleted_as_an_object_and_in_the_store(
    cluster: ApiServer, settings: Settings, store: StoreProcess
) -> None:
    store.call("PUT", "team-a/adapters/one/adapter_config.json", b"{}")
    async with gateway(settings) as client:
        assert (await client.models.delete("team-a/one")).deleted
    assert json.loads(cluster.kubectl("get", "loraadapters", "-n", A, "-o", "json"))["items"] == []
    assert store.keys(A, "adapters/") == []

"""Requests made from the gateway's OpenAPI document, right ones and wrong ones: no answer is a 5xx, and each fits it.

The gateway is in front of the true server of a runtime, whose engine is a fake.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import requests
import schemathesis
from fakes_runtime import save_byte_tokenizer, serving
from gateway_world import KEY, api_key
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans, integers
from openapi_spec_validator import validate
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from store_kit import StoreProcess, running_store
from tuning_world import A, tuning_world

from lorapool_api.protocol import ROUTE_OPENAPI, token_sha256
from lorapool_api.tuning.finetunejob import ANNOTATION_JOB
from lorapool_gateway.app import OPENAPI
from lorapool_gateway.routing.auth import KeyTable
from lorapool_gateway.tuning.routes import ROUTE_FILES, ROUTE_JOBS

AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [(path, method) for path, item in json.loads(OPENAPI)["paths"].items() for method in item]
NEEDED = ("model", "messages", "prompt", "input", "tokens", "training_file", "purpose", "file")
FEW, MANY = 15, 400


@dataclass(frozen=True)
class Served:
    """The gateway's address, and what there is behind it."""

    url: str
    file: str

    def post(self, path: str, **more: object) -> str:
        """The id of what was made."""
        response = requests.post(self.url + path, headers=AUTHORIZATION, timeout=30, **more)  # type: ignore[arg-type]
        return str(response.json()["id"])

    def upload(self) -> str:
        return self.post(ROUTE_FILES, data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"{}")})

    def job(self) -> str:
        return self.post(ROUTE_JOBS, json={"model": "models/tiny", "training_file": self.file})

    def known(self, path: str, method: str) -> str:
        """An id or a name with which the operation succeeds. What an operation ends is made for it."""
        if path.startswith(ROUTE_FILES):
            return self.upload() if method == "delete" else self.file
        return self.job() if path.startswith(ROUTE_JOBS) else "tuned" if method == "delete" else "route"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    with running_store(tmp_path_factory.mktemp("store")) as made:
        yield made


@pytest.fixture(scope="module")
def served(store: StoreProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway with one adapter, files and fine-tuning, in a thread of its own, since the tests' client blocks."""
    tokenizer, ready, over = (
        save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        threading.Event(),
        threading.Event(),
    )
    made: list[Served] = []

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            runtime = await stack.enter_async_context(
                serving(tokenizer, token_sha256=token_sha256("t" * 64), pod_uid="pod")
            )
            here = await stack.enter_async_context(tuning_world(store, tuning_unfinished_jobs=100_000))
            namespaces = f"{A},models,demo"
            here.world.keys.publish(KeyTable.of([api_key(KEY, namespaces, default_namespace=A, fine_tuning=True)]))
            here.world.base()
            here.world.adapter("route")
            here.world.replica(runtime.url)
            here.world.adapter("tuned", A, base_namespace="models")
            here.world.adapters[f"{A}/tuned"]["metadata"]["annotations"] = {ANNOTATION_JOB: "a job"}
            here.world.publish()
            made.append(Served(here.world.url, await here.upload()))
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not ready.wait(1):
        assert thread.is_alive()
    yield made[0]
    over.set()
    thread.join(30)


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, object]:
    found: dict[str, object] = requests.get(served.url + ROUTE_OPENAPI, headers=AUTHORIZATION, timeout=10).json()
    return found


def test_the_document_is_valid_openapi_and_is_given_to_keys_only(served: Served, document: dict[str, object]) -> None:
    validate(document)
    assert requests.get(served.url + ROUTE_OPENAPI, timeout=10).status_code == 401


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.deep)])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_is_answered_with_5xx_and_every_answer_fits_the_document(
    served: Served, document: dict[str, object], path: str, method: str, mode: GenerationMode, examples: int
) -> None:
    operation = schemathesis.openapi.from_dict(json.loads(json.dumps(document)))[path][method]
    statuses: set[int] = set()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode), options=integers(0, 4), known=booleans())
    def ask(case: Case, options: int, known: bool) -> None:
        name_what_exists(case, served, path, method, known)
        if mode is GenerationMode.POSITIVE:
            leave_out(case, options)
        response = case.call(base_url=served.url, headers=AUTHORIZATION, timeout=30)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode is GenerationMode.POSITIVE:
        assert 200 in statuses


def name_what_exists(case: Case, served: Served, path: str, method: str, known: bool) -> None:
    """Replaces names that no generator can guess; half of those in paths stay as they were drawn."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "models/tiny" if path == ROUTE_JOBS else "route"
    if isinstance(case.body, dict) and isinstance(case.body.get("training_file"), str):
        case.body["training_file"] = served.file
    if known and case.path_parameters:
        case.path_parameters = dict.fromkeys(case.path_parameters, served.known(path, method))
    if known and "OpenAI-Organization" in (case.headers or {}):
        case.headers["OpenAI-Organization"] = A


def leave_out(case: Case, options: int) -> None:
    """Keeps few of the optional members: most exclude some others."""
    if isinstance(case.body, dict):
        for name in [name for name in case.body if name not in NEEDED][options:]:
            del case.body[name]
    if options < 2:
        case.query, case.headers = {}, {}

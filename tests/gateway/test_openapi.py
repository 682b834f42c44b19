"""Requests made from the gateway's OpenAPI document, right ones and wrong ones: no answer is a 5xx, and each fits it.

The gateway is in front of the true server of a runtime, whose engine is a fake.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from fakes_runtime import save_byte_tokenizer, serving
from gateway_world import KEY, world
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import integers
from openapi_spec_validator import validate
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lorapool_api.protocol import (
    ROUTE_CHAT,
    ROUTE_COMPLETIONS,
    ROUTE_DETOKENIZE,
    ROUTE_MODELS,
    ROUTE_OPENAPI,
    ROUTE_RESPONSES,
    ROUTE_TOKENIZE,
    token_sha256,
)

AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    (ROUTE_CHAT, "POST"),
    (ROUTE_COMPLETIONS, "POST"),
    (ROUTE_RESPONSES, "POST"),
    (ROUTE_TOKENIZE, "POST"),
    (ROUTE_DETOKENIZE, "POST"),
    (ROUTE_MODELS, "GET"),
    (ROUTE_MODELS + "/{model}", "GET"),
]
FEW, MANY = 15, 400


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway with one adapter, in a thread of its own, since the client of the tests is a blocking one."""
    tokenizer, ready, over = (
        save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        threading.Event(),
        threading.Event(),
    )
    urls: list[str] = []

    async def serve() -> None:
        async with serving(tokenizer, token_sha256=token_sha256("t" * 64), pod_uid="pod") as served, world() as here:
            here.base()
            here.adapter("route")
            here.replica(served.url)
            urls.append(here.url)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield urls[0]
    over.set()
    thread.join(30)


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, object]:
    found: dict[str, object] = requests.get(url + ROUTE_OPENAPI, headers=AUTHORIZATION, timeout=10).json()
    return found


def test_the_document_is_valid_openapi_and_is_given_to_keys_only(url: str, document: dict[str, object]) -> None:
    validate(document)
    assert requests.get(url + ROUTE_OPENAPI, timeout=10).status_code == 401


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.deep)])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_is_answered_with_5xx_and_every_answer_fits_the_document(
    url: str, document: dict[str, object], path: str, method: str, mode: GenerationMode, examples: int
) -> None:
    operation = schemathesis.openapi.from_dict(json.loads(json.dumps(document)))[path][method]
    statuses: set[int] = set()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode), options=integers(0, 4))
    def ask(case: Case, options: int) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "route"
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:  # most options exclude some others
            optional = [name for name in case.body if name not in ("model", "messages", "prompt", "input", "tokens")]
            for name in optional[options:]:
                del case.body[name]
        response = case.call(base_url=url, headers=AUTHORIZATION, timeout=30)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode is GenerationMode.POSITIVE and "{" not in path:
        assert 200 in statuses

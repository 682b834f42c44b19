"""One real API server with the committed CRDs for all of the operator's tests that need one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from apiserver import ApiServer, running_apiserver
from operator_world import Api, namespace_of

CRDS = Path(__file__).resolve().parents[2] / "crds"


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running_apiserver(tmp_path_factory.mktemp("operator")) as server:
        server.install_crds(*sorted(CRDS.glob("*.yaml")))
        yield server


@pytest.fixture
async def api(api_server: ApiServer) -> AsyncIterator[Api]:
    async with namespace_of(api_server) as made:
        yield made

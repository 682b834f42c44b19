"""The operator against a real API server: bases, adapters, and what their status says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fakes_operator import FakeInspector
from operator_world import Api, condition, running_operator, until

pytestmark = pytest.mark.apiserver


async def test_a_base_gets_its_children_and_an_adapter_is_judged(api: Api, tmp_path: Path) -> None:
    async with running_operator(api, tmp_path, FakeInspector()):
        await api.base()
        await api.adapter("a")

        async def state() -> Any:
            return condition(await api.get("loraadapters", "a"), "Ready")

        await until(state, ("True", "Parked"))

        async def children() -> Any:
            return [
                await api.find(plural, "tiny-runtime") for plural in ("deployments", "services", "poddisruptionbudgets")
            ]

        async def complete() -> bool:
            return all(await children())

        await until(complete)
        deployment, service, _ = await children()
        assert deployment["spec"]["replicas"] == 1
        assert service["spec"]["clusterIP"] == "None"

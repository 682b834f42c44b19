"""Fixtures: a hub, an S3 server and an OCI registry on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from artifact_hub import Hub

from lorapool_artifacts.settings import FetchLimits, SourceSettings


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def hf(hub: Hub) -> SourceSettings:
    return SourceSettings(hf_endpoint=hub.url)


@pytest.fixture
def quick() -> FetchLimits:
    """Short timeouts for tests of slow sources."""
    return FetchLimits(max_total_bytes=1_000_000, connect_timeout_s=2.0, idle_timeout_s=0.4, total_timeout_s=2.0)

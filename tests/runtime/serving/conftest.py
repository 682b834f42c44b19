"""A served runtime with a fake engine, and the unmodified client of its API. A module may have its own `served`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from fakes_runtime import FakeEngine, Served, serving


@pytest.fixture
async def served(byte_tokenizer: Path) -> AsyncIterator[Served]:
    async with serving(byte_tokenizer, engine=FakeEngine(max_model_len=4096)) as running:
        yield running


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made

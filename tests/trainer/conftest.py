"""A tiny base, and sessions of jobs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tuning_kit import Job, MakeJob, save_tiny_base, write_data, write_job

from lorapool_trainer.data.encoder import Encoder
from lorapool_trainer.engine import Engine, Numerics
from lorapool_trainer.local_files import read_jobs
from lorapool_trainer.session import BaseName, Session, SessionLimits
from lorapool_trainer.suspects import Suspects


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base: Path) -> Iterator[Encoder]:
    made = Encoder.of_base(base, rows=260)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    """Sessions follow each other on one engine; each removes its jobs."""
    return Engine.load(str(base), dtype="float32", numerics=Numerics.EXACT, token_budget=256)


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    data = write_data(tmp_path / "data.jsonl")

    def make(name: str, data: Path = data, out: str = "out", **spec: object) -> Job:
        return read_jobs(write_job(tmp_path, name, data, **spec), tmp_path / out)[0]

    return make


@pytest.fixture
def start(engine: Engine, encoder: Encoder, tmp_path: Path) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def begin(*jobs: Job, max_jobs: int = 8, base: str = "base-1") -> Session:
        session = Session(engine, encoder, BaseName("tiny", base), Suspects(tmp_path), SessionLimits(max_jobs))
        sessions.append(session)
        for order, files in jobs:
            session.put(order, files)
        return session

    yield begin
    for session in sessions:
        for uid in list(session.jobs):
            session.delete(uid)

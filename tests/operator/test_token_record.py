"""The ConfigMap with trained tokens: written seldom, never over what another operator wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from lorapool_operator.decisions.tuning.tokens import MonthRecord
from lorapool_operator.effects.cluster import Cluster, ObjectConflictError, ObjectNotFoundError
from lorapool_operator.effects.token_record import RECORD_S, TokenRecord


class OneConfigMap:
    """Answers as the API server does about one ConfigMap."""

    def __init__(self) -> None:
        self.raw: dict[str, Any] | None = None
        self.writes = 0

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        if self.raw is None:
            raise ObjectNotFoundError("not found", 404)
        return self.raw

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if self.raw is not None:
            raise ObjectConflictError("exists", 409)
        return self._written(manifest["data"])

    async def patch_data(
        self, kind: str, namespace: str, name: str, version: str, data: Mapping[str, str]
    ) -> dict[str, Any]:
        if self.raw is None or self.raw["metadata"]["resourceVersion"] != version:
            raise ObjectConflictError("changed", 409)
        return self._written({**self.raw["data"], **data})

    def _written(self, data: Mapping[str, str]) -> dict[str, Any]:
        self.writes += 1
        self.raw = {"metadata": {"resourceVersion": str(self.writes)}, "data": dict(data)}
        return self.raw


async def record_of(server: OneConfigMap) -> TokenRecord:
    made = TokenRecord(cast(Cluster, server), "lorapool", "tokens")
    await made.read()
    return made


def month(tokens: int) -> MonthRecord:
    return MonthRecord(month="2026-11", tokens=tokens, jobs={"uid": tokens})


async def test_a_new_operator_reads_what_the_last_one_wrote_of_each_namespace() -> None:
    server = OneConfigMap()
    first = await record_of(server)
    await first.write({"a": month(5)}, 100.0)
    await first.write({"a": month(5), "b": month(7)}, 100.0 + RECORD_S)
    again = await record_of(server)
    assert (again.of("a"), again.of("b"), again.of("c")) == (month(5), month(7), MonthRecord())


async def test_it_is_written_seldom_but_at_once_where_a_job_is_about_to_go() -> None:
    server = OneConfigMap()
    record = await record_of(server)
    for second in range(int(RECORD_S)):
        await record.write({"a": month(second)}, 100.0 + second)
    assert server.writes == 1
    await record.write({"a": month(40)}, 101.0, at_once=True)
    await record.write({"a": month(40)}, 102.0 + RECORD_S, at_once=True)  # nothing is new
    assert (server.writes, record.of("a")) == (2, month(40))


async def test_what_another_operator_wrote_is_read_before_anything_is_written() -> None:
    server = OneConfigMap()
    old, new = await record_of(server), await record_of(server)
    await new.write({"a": month(9)}, 100.0)
    with pytest.raises(ObjectConflictError):
        await old.write({"a": month(5)}, 100.0)
    assert not old.known
    await old.write({"a": month(5)}, 200.0)  # nothing before it was read
    await old.read()
    assert (server.writes, old.of("a")) == (1, month(9))


async def test_a_key_that_cannot_be_read_counts_from_nothing_and_hides_no_other() -> None:
    server = OneConfigMap()
    server._written({"a": "{", "b": month(7).model_dump_json()})
    record = await record_of(server)
    assert (record.of("a"), record.of("b")) == (MonthRecord(), month(7))

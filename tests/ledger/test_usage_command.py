"""`lorapool usage` against the API of a ledger, and its errors in words."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from ledger_kit import sqlite_url
from sqlalchemy import text
from usage_kit import DEFAULT_PRICES, NOW_S, fill, fill_pods, fill_prices, organization_api, serving, some_usage

from lorapool_cli.usage_command import main
from lorapool_ledger.store.database import Database


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[str, Database]]:
    database = Database.open(sqlite_url(tmp_path))

    def filled(connection: Any) -> None:
        fill(connection, some_usage())
        fill_pods(connection)
        fill_prices(connection, *DEFAULT_PRICES)

    await database.write(filled)
    async with serving(organization_api(database).handle) as url:
        yield url, database
    await database.close()


async def run(url: str, *arguments: str, key: str = "owner", folder: Path) -> tuple[int, str]:
    file = folder / "key"
    file.write_text(f"lp-{key}\n")
    out = io.StringIO()
    given: Sequence[str] = [
        "--url",
        url,
        "--key-file",
        str(file),
        "--since",
        "2026-11",
        "--until",
        "2026-11-30",
        *arguments,
    ]
    code = await asyncio.to_thread(main, given, now=lambda: NOW_S, out=out)
    return code, out.getvalue()


@pytest.mark.parametrize("by", ["", "day", "project", "key", "model", "project,key,model", "day,model"])
async def test_every_grouping_adds_up_to_one_sum_by_sql(served: tuple[str, Database], tmp_path: Path, by: str) -> None:
    url, database = served
    code, written = await run(url, "--by", by, "--csv", folder=tmp_path)
    rows = list(csv.DictReader(io.StringIO(written)))
    query = (
        "SELECT sum(requests), sum(billed_prompt_tokens + billed_cached_tokens), sum(billed_cached_tokens), "
        "sum(billed_completion_tokens) FROM usage_hour WHERE outcome IN ('completed', 'client_left')"
    )
    (expected,) = await database.read(lambda connection: list(connection.execute(text(query))))
    names = ("requests", "input_tokens", "cached_tokens", "output_tokens")
    assert code == 0
    assert [sum(int(row[name]) for row in rows) for name in names] == list(expected)
    whole = list(csv.DictReader(io.StringIO((await run(url, "--by", "", "--csv", folder=tmp_path))[1])))
    assert sum(Decimal(row["cost"]) for row in rows) == Decimal(whole[0]["cost"]) > 0
    assert (len(rows) > 1) == bool(by)


async def test_a_tenant_reads_its_own_project_as_a_table(served: tuple[str, Database], tmp_path: Path) -> None:
    code, written = await run(served[0], "--by", "project,model", key="acme", folder=tmp_path)
    lines = written.splitlines()
    assert code == 0
    assert lines[0].split() == ["project", "model", "requests", "input", "cached", "output", "cost"]
    assert [line.split()[:2] for line in lines[1:3]] == [["acme", "acme/short"], ["acme", "acme/tone"]]
    assert lines[-1].startswith("total")
    assert "globex" not in written
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


async def test_filters_narrow_usage_and_costs_alike(served: tuple[str, Database], tmp_path: Path) -> None:
    _, all_models = await run(served[0], "--by", "model", "--csv", folder=tmp_path)
    _, one = await run(served[0], "--by", "model", "--csv", "--model", "acme/tone", folder=tmp_path)
    assert one.splitlines()[1] in all_models.splitlines()
    assert len(one.splitlines()) == 2


async def test_errors_are_said_in_words(
    served: tuple[str, Database], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = served[0]
    monkeypatch.delenv("LORAPOOL_API_KEY", raising=False)
    monkeypatch.delenv("LORAPOOL_URL", raising=False)

    async def said(*arguments: str, base: str = url, key: str = "owner") -> tuple[int, str]:
        code, _ = await run(base, *arguments, key=key, folder=tmp_path)
        return code, capsys.readouterr().err

    assert await said(key="wrong") == (
        1,
        f"lorapool usage: {url} answered 401. The API key is not known or was revoked. "
        "Check the key in LORAPOOL_API_KEY or --key-file.\n",
    )
    for arguments, words in (
        (["--by", "colour"], "choose some of day, project, key, model"),
        (["--since", "yesterday"], "write a day such as 2026-11-01"),
        (["--since", "2026-02-30"], "write a day such as 2026-11-01"),
        (["--since", "2026-11-30", "--until", "2026-11-01"], "The period is empty"),
        (["--key-file", str(tmp_path / "none")], "cannot be read"),
        (["--url", "gateway"], "Name the gateway with --url"),
    ):
        code, text = await said(*arguments)
        assert (code, words in text) == (1, True), text
    code, text = await said(base="http://127.0.0.1:1")
    assert code == 3
    assert "does not answer as a gateway does" in text
    assert main(["--url", url, "--since", "1d"], now=lambda: NOW_S) == 1
    assert "Put an API key into LORAPOOL_API_KEY" in capsys.readouterr().err


async def test_another_server_is_no_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def other(_: web.BaseRequest) -> web.Response:
        return web.json_response(["something"])

    async with serving(other) as url:
        assert (await run(url, folder=tmp_path))[0] == 3
    assert "is no gateway of Lorapool" in capsys.readouterr().err

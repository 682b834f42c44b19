"""Exports: DuckDB, which shares no code with the ledger, counts the files and arrives at the ledger's sums."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from ledger_kit import T0_S, batch, boot, boot_state, closed, opened, request, rows, sqlite_url

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.intake import gateway_batch, runtime_page
from lorapool_ledger.intake.runtime_page import Pod
from lorapool_ledger.metrics import Metrics
from lorapool_ledger.store import tables
from lorapool_ledger.store.database import Database
from lorapool_ledger.sums.export import COUNTS, export
from lorapool_ledger.sums.rollups import RollUps

POD = Pod("pod-1", "runtime-1", "base-1", "acme/base")
END_S = T0_S + 86_400


async def fill(database: Database, count: int = 400) -> None:
    """Attempts with every pair of ends, some with one half alone."""
    choose = random.Random(5)
    halves, records, seq = [boot()], [], 0
    for number in range(count):
        has_runtime, has_gateway = choose.random() < 0.9, choose.random() < 0.9
        whose = {"project": choose.choice(["acme", "zeta"]), "key_uid": f"key-{choose.randrange(5)}"}
        if has_runtime:
            counts = {"prompt_tokens": choose.randrange(4, 999), "completion_tokens": choose.randrange(999)}
            halves.append(request(len(halves) + 1, number, outcome=choose.choice(list(Ended)), **counts, **whose))
        if has_gateway:
            outcome = choose.choice(list(AttemptEnd))
            records += [opened(seq + 1, number, **whose), closed(seq + 2, number, outcome=outcome)]
            seq += 2
    state = [boot_state("boot-1", halves)]
    await database.write(
        lambda connection: runtime_page.take(connection, POD, "boot-1", halves, state, END_S * 1000, END_S)
    )
    for start in range(0, len(records), 500):
        part = batch(records[start : start + 500], now_unix_ms=END_S * 1000)
        await database.write(lambda connection, part=part: gateway_batch.take(connection, part, END_S))  # type: ignore[misc]
    await RollUps(database, Metrics(), now_s=lambda: END_S).catch_up()


@pytest.mark.parametrize("name", ["requests.jsonl", "requests.csv"])
async def test_another_program_counts_the_same(database: Database, tmp_path: Path, name: str) -> None:
    await fill(database)
    done = await database.read(lambda connection: export(connection, tmp_path / "out", T0_S, END_S))
    sums = await rows(database, tables.usage_hour)
    file = tmp_path / "out" / name
    reader = "read_json" if name.endswith("jsonl") else "read_csv"
    totals = ", ".join(f"sum({count})::BIGINT" for count in COUNTS)
    counted = duckdb.sql(
        f"SELECT project, outcome, {totals} FROM {reader}('{file}') GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    expected: dict[tuple[str, str], list[int]] = {}
    for row in sums:
        kept = expected.setdefault((row["project"], row["outcome"]), [0] * len(COUNTS))
        for index, count in enumerate(COUNTS):
            kept[index] += row[count]
    assert [tuple(row) for row in counted] == [(*key, *values) for key, values in sorted(expected.items())]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sums"] == done.sums
    assert manifest["rows"] == done.rows == duckdb.sql(f"SELECT count(*) FROM {reader}('{file}')").fetchall()[0][0]
    assert manifest["files"][name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sum(project["requests"] for project in manifest["projects"].values()) == done.sums["requests"]


async def test_no_cell_of_the_csv_is_a_formula(database: Database, tmp_path: Path) -> None:
    hostile = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]
    halves = [boot(), *(request(2 + index, index, request_id=text) for index, text in enumerate(hostile))]
    await database.write(
        lambda connection: runtime_page.take(connection, POD, "boot-1", halves, [], END_S * 1000, END_S)
    )
    await database.read(lambda connection: export(connection, tmp_path / "out", T0_S, END_S))
    with (tmp_path / "out" / "requests.csv").open(newline="") as file:
        assert [row["request_id"] for row in csv.DictReader(file)] == ["'" + text for text in hostile]
    lines = (tmp_path / "out" / "requests.jsonl").read_text().splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == hostile


async def test_the_command_writes_a_period_and_refuses_what_is_there(tmp_path: Path) -> None:
    database = Database.open(sqlite_url(tmp_path))
    await fill(database, 20)
    await database.close()
    (tmp_path / "token").write_text("t" * 64)
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
        "LORAPOOL_LEDGER_DATABASE_URL": sqlite_url(tmp_path),
        "LORAPOOL_LEDGER_KEYS_NAMESPACE": "lorapool",
    }
    command = [sys.executable, "-m", "lorapool_ledger", "export", "--out", str(tmp_path / "out")]
    period = ["--from", "2026-11-01", "--to", "2026-12-01"]
    for arguments, code, said in (
        (period, 0, "lines"),
        (period, 1, "name an empty folder"),
        (["--from", "2026-11-01", "--to", "2026-11-01"], 1, "--from must be before --to"),
        (["--from", "soon", "--to", "2026-11-01"], 2, "invalid"),
    ):
        given = [*command, *arguments]
        done = await asyncio.to_thread(subprocess.run, given, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr

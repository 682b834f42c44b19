"""The bill of the demo's fine-tunes: shown at its end, exact by request, and on the console."""

from __future__ import annotations

import ssl
import time
import urllib.request
from decimal import Decimal
from typing import Any

import yaml
from e2e_world import ROOT, World

DAY_S = 86400


def usage_of(world: World, model: str) -> tuple[int, int, int]:
    """Requests, input and output tokens of a model since yesterday, by the official client."""
    start = (int(time.time()) // DAY_S - 1) * DAY_S
    with world.client(admin_api_key=world.summary["api_key"]) as client:
        page = client.admin.organization.usage.completions(
            start_time=start, bucket_width="1d", limit=2, group_by=["model"], models=[model]
        )
    rows: list[Any] = [row.to_dict() for bucket in page.data for row in bucket.results]
    names = ("num_model_requests", "input_tokens", "output_tokens")
    requests, read, written = (sum(int(row[name]) for row in rows) for name in names)
    return requests, read, written


def test_the_demo_ends_with_the_bill_of_its_five_fine_tunes(world: World) -> None:
    bill = {line["model"]: line for line in world.summary["bill"]}
    assert set(bill) == {world.model(task) for task in world.tasks}
    values = yaml.safe_load((ROOT / "hack" / "demo" / "values.yaml").read_text())
    [prices] = values["ledger"]["prices"]["entries"]
    for answer in world.summary["answers"]:
        line = bill[answer["adapter"]]
        assert line["requests"] >= 2
        assert line["input_tokens"] >= 2 * answer["prompt_tokens"]
        assert line["output_tokens"] >= 2 * answer["completion_tokens"]
        counts = {
            "promptPerMillion": line["input_tokens"] - line["cached_tokens"],
            "cachedPerMillion": line["cached_tokens"],
            "completionPerMillion": line["output_tokens"],
        }
        tokens = sum((Decimal(prices[name]) * count for name, count in counts.items()), Decimal(0)) / 10**6
        # In addition to the tokens, memory: 8 slots of the demo hold a few megabytes.
        assert tokens <= Decimal(line["amount"]) < tokens + Decimal("0.01")
        assert line["currency"] == prices["currency"]


def test_the_ledger_counts_a_request_as_its_answer_says(world: World) -> None:
    task = world.tasks[0]
    world.chat(task)  # whatever ran before is counted before it

    def settled() -> object:
        first = usage_of(world, world.model(task))
        time.sleep(6)
        return usage_of(world, world.model(task)) == first

    world.wait("the sums of what ran before", settled, timeout_s=120)
    before = usage_of(world, world.model(task))
    with world.client() as client:
        usage = client.chat.completions.create(**world.question(task)).usage
    assert usage is not None
    wanted = (before[0] + 1, before[1] + usage.prompt_tokens, before[2] + usage.completion_tokens)
    world.wait("the request in the ledger", lambda: usage_of(world, world.model(task)) == wanted, timeout_s=120)


def test_the_console_answers_at_the_url_that_the_demo_shows(world: World) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the release's own authority
    with urllib.request.urlopen(world.summary["console_url"], timeout=30, context=context) as response:
        assert response.status == 200
        assert "Content-Security-Policy" in response.headers
        assert world.summary["api_key"] not in response.read().decode()


def test_the_ledger_agrees_with_itself(world: World) -> None:
    def reconciled() -> object:
        found = world.prometheus("max(lorapool_ledger_unreconciled_tokens) or vector(-1)")
        return [float(sample["value"][1]) for sample in found] == [0.0]

    world.wait("a reconciled ledger", reconciled, timeout_s=120, every_s=3)

"""Waits until the ledger has what was asked, then prints the bill of each fine-tune as JSON.

Run in the Python environment, with an object of `url`, `api_key`, `models` and `requests` (at least so many of each) on
standard input. It reads usage and costs by the unmodified OpenAI client. All of the demo's usage is of the last days.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

from openai import APIStatusError, OpenAI

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run by path: hack/ holds the package

from demo.questions import BillLine  # noqa: E402  (needs the path above)

DAYS = 7
WAIT_S = 150
POLL_S = 3
DAY_S = 86400


def bill(client: OpenAI, models: list[str]) -> list[BillLine]:
    """One line for each model, and what it costs in all."""
    start = (int(time.time()) // DAY_S - DAYS + 1) * DAY_S
    organization = client.admin.organization
    usage = organization.usage.completions(start_time=start, bucket_width="1d", limit=DAYS, group_by=["model"])
    counts = dict.fromkeys(models, (0, 0, 0, 0))
    for bucket in usage.data:
        for row in bucket.results:
            found = row.to_dict()
            if found.get("model") in counts:
                requests, read, cached, written = counts[model := str(found["model"])]
                counts[model] = (
                    requests + int(str(found["num_model_requests"])),
                    read + int(str(found["input_tokens"])),
                    cached + int(str(found["input_cached_tokens"])),
                    written + int(str(found["output_tokens"])),
                )
    amounts, currency = dict.fromkeys(models, Decimal(0)), ""
    costs = organization.usage.costs(start_time=start, limit=DAYS, group_by=["line_item"])
    for day in costs.data:
        for line in day.results:
            found = line.to_dict()
            model = str(found.get("line_item") or "").partition(", ")[0]
            amount = found.get("amount")
            if model in amounts and isinstance(amount, dict):
                amounts[model] += Decimal(str(amount["value"]))
                currency = str(amount["currency"]).upper()
    return [BillLine(model, *counts[model], format(amounts[model], "f"), currency) for model in models]


def main() -> None:
    asked = json.load(sys.stdin)
    client = OpenAI(base_url=asked["url"], api_key="unused", admin_api_key=asked["api_key"], max_retries=0)
    deadline = time.monotonic() + WAIT_S
    while True:
        problem = ""
        try:
            lines = bill(client, asked["models"])
            late = [line.model for line in lines if line.requests < asked["requests"] or not Decimal(line.amount)]
            if not late:
                print(json.dumps([asdict(line) for line in lines]))
                return
            problem = f"the ledger does not have all of {', '.join(late)} yet"
        except APIStatusError as error:
            problem = f"the API for usage answers {error.status_code}: {error.message}"
        if time.monotonic() > deadline:
            sys.exit(problem)
        print(problem, file=sys.stderr, flush=True)
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()

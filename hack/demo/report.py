"""The tables that the demo prints at its end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from demo.questions import Answer, BillLine, Trained


def table(answers: list[Answer]) -> str:
    """One block a fine-tune: question, both answers, identity, tokens, times."""
    lines = []
    for answer in answers:
        lines.append(f"\n\033[1m{answer.task}\033[0m   {_clip(answer.header, 100)}")
        lines.append(_row("asked", answer.question))
        lines.append(_row("base", answer.base_answer))
        lines.append(_row("fine-tune", answer.answer))
        lines.append(
            f"  {'':9}  {answer.prompt_tokens} + {answer.completion_tokens} tokens, "
            f"cold {answer.cold_s:.2f} s, warm {answer.warm_s:.2f} s"
        )
    return "\n".join(lines)


def trained_block(trained: Trained) -> str:
    """What was trained, how well it does on lines that it has not seen, and its answer."""
    losses = f"loss {trained.base_loss:.2f} -> {trained.loss:.2f}" if trained.loss and trained.base_loss else ""
    lines = [
        f"\n\033[1mtrained here\033[0m   {trained.model}",
        _row("asked", trained.question),
        _row("base", trained.base_answer),
        _row("fine-tune", trained.answer),
        f"  {'':9}  {trained.trained_tokens} tokens in {trained.seconds:.0f} s from upload to model, {losses}",
    ]
    return "\n".join(lines)


def _row(label: str, text: str) -> str:
    wrapped = textwrap.wrap(_clip(" ".join(text.split()), 240) or "(nothing)", 96)
    return "\n".join(f"  {label if number == 0 else '':9}  {line}" for number, line in enumerate(wrapped))


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def usage_table(adapters: list[dict[str, Any]]) -> str:
    """What each adapter has used so far, from its status."""
    header = ("ADAPTER", "REQUESTS", "PROMPT", "COMPLETION", "LOADS", "LOAD-S", "RESIDENT-S")
    rows = [header]
    for adapter in adapters:
        usage = adapter.get("status", {}).get("usage") or {}
        rows.append(
            (
                adapter["metadata"]["name"],
                str(usage.get("requests", 0)),
                str(usage.get("promptTokens", 0)),
                str(usage.get("completionTokens", 0)),
                str(usage.get("loads", 0)),
                f"{usage.get('loadSeconds', 0):.2f}",
                f"{usage.get('residencySeconds', 0):.0f}",
            )
        )
    return _columns(rows)


def bill_table(lines: list[BillLine]) -> str:
    """What each fine-tune costs by the demo's prices, and the sum."""
    currency = lines[0].currency if lines else ""
    rows: list[tuple[str, ...]] = [("MODEL", "REQUESTS", "INPUT", "CACHED", "OUTPUT", f"AMOUNT {currency}")]
    for line in lines:
        counts = (line.requests, line.input_tokens, line.cached_tokens, line.output_tokens)
        rows.append((line.model, *map(str, counts), f"{Decimal(line.amount):.6f}"))
    rows.append(("together", "", "", "", "", f"{sum(Decimal(line.amount) for line in lines):.6f}"))
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    header = rows[0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

"""The console in a real Chromium: names execute nothing, no JavaScript is needed, totals agree, themes are legible.

`LORAPOOL_SCREENSHOTS=docs/images` also writes the pictures of docs/how-to/use-the-console.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from chromium_kit import chromium
from ledger_kit import T0_S, sqlite_url
from openai import AsyncOpenAI
from playwright.async_api import Browser, Page
from usage_kit import DAY, HOSTILE, SomeLive, fill_all, fill_finding, serving_all

from lorapool_ledger.store.database import Database

MONTH = "period=2026-11"
OWNER = (
    "",
    "bases",
    "adapters",
    "adapter/acme/tone",
    "tenants",
    "project/acme",
    "bill",
    "reconciliation",
    "failures",
    "prices",
)


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    database = Database.open(sqlite_url(tmp_path))
    await database.write(fill_all)
    async with serving_all(database, live=SomeLive()) as served:
        yield served
    await database.close()


async def opened(browser: Browser, url: str, name: str, *, scripts: bool = True, **given: Any) -> Page:
    """A page that is logged in."""
    context = await browser.new_context(
        java_script_enabled=scripts, viewport={"width": 1280, "height": 860}, reduced_motion="reduce", **given
    )
    page = await context.new_page()
    page.set_default_timeout(60_000)
    await page.goto(f"{url}/console/")
    await page.fill("#key", f"lp-{name}")
    await page.click("button.main")
    await page.wait_for_selector("h1:has-text('Overview')")
    return page


async def test_nothing_executes_from_names_and_nothing_is_loaded_from_elsewhere(url: str, tmp_path: Path) -> None:
    database = Database.open(sqlite_url(tmp_path))
    await database.write(fill_finding)
    await database.close()
    async with chromium() as browser:
        page = await opened(browser, url, "owner")
        events: list[str] = []
        page.on("dialog", lambda dialog: events.append(f"dialog {dialog.message}"))
        page.on("console", lambda message: events.append(f"console {message.text}"))
        page.on("request", lambda request: events.append(request.url) if not request.url.startswith(url) else None)
        for path in (*OWNER, f"requests?id={HOSTILE}", f"adapters?q=%22%3E{HOSTILE}", f"adapter/{HOSTILE}"):
            await page.goto(f"{url}/console/{path}{'&' if '?' in path else '?'}{MONTH}")
            assert await page.title() != "owned"
            assert await page.evaluate("document.scripts.length") == 0
        assert [event for event in events if "favicon" not in event and "404" not in event] == []


async def test_the_console_works_without_javascript(url: str) -> None:
    async with chromium() as browser:
        page = await opened(browser, url, "acme", scripts=False)
        await page.click("nav.periods >> text=2026-11")
        await page.click("nav.menu >> text=Bill")
        assert "period=2026-11" in page.url, "the period goes with the reader"
        await page.wait_for_selector("h1:has-text('Bill')")
        await page.click("nav.menu >> text=Requests")
        await page.fill("#id", "req-0001")
        await page.click("text=Look up")
        assert "yes the client ended it" not in await page.inner_text("main")
        assert "the whole answer was delivered" in await page.inner_text("main")
        await page.click("form.theme >> text=dark")
        assert "id=req-0001" in page.url
        assert await page.get_attribute("html", "data-theme") == "dark"
        await page.click("text=Log out")
        await page.goto(f"{url}/console/bill")
        assert "/console/login" in page.url


async def test_displayed_totals_are_those_of_the_official_client_and_of_the_export(url: str) -> None:
    async with chromium() as browser, AsyncOpenAI(admin_api_key="lp-acme", api_key="-", base_url=f"{url}/v1") as client:
        page = await opened(browser, url, "acme")
        await page.goto(f"{url}/console/?{MONTH}")
        shown = await page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.card')].map(card => "
            "[card.querySelector('dt').innerText, card.querySelector('data').value]))"
        )
        calls = client.admin.organization.usage
        usage = await calls.completions(start_time=T0_S, end_time=T0_S + 30 * DAY, limit=31)
        costs = await calls.costs(start_time=T0_S, end_time=T0_S + 30 * DAY, limit=31)
        results: list[Any] = [result for bucket in usage.data for result in bucket.results]
        charged: list[Any] = [result for bucket in costs.data for result in bucket.results]
        spend = sum(Decimal(str(item.amount.value)) for item in charged)
        assert Decimal(shown["Spend"]) == spend
        assert int(shown["Requests"]) == sum(item.num_model_requests for item in results)
        assert int(shown["Prompt tokens"]) == sum(item.input_tokens for item in results)
        assert int(shown["Generated tokens"]) == sum(item.output_tokens for item in results)
        async with page.expect_download() as waiting:
            await page.click("text=Costs as CSV")
        downloaded = await (await waiting.value).path()
        lines = (await asyncio.to_thread(downloaded.read_text)).splitlines()[1:]
        assert sum(Decimal(line.split(",")[6]) for line in lines) == spend


CONTRAST = """() => {
  const light = colour => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!colour.endsWith(', 0)')) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('body *')].filter(node => !node.closest('svg') &&
    [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())).map(node => {
      const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
      return [(a + .05) / (b + .05), node.tagName + ' ' + node.innerText.slice(0, 30)];
    }).filter(([ratio]) => ratio < 4.5);
}"""
LABELS = """() => [
  ...[...document.querySelectorAll('table')].filter(t => !t.querySelector('thead th[scope=col]')).map(t => t.innerText),
  ...[...document.querySelectorAll('input:not([type=hidden])')].filter(i => !i.labels.length).map(i => i.name),
  ...[...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')).map(s => s.outerHTML),
]"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_both_themes_are_legible_and_nothing_overflows(url: str, scheme: Any) -> None:
    pictures = os.environ.get("LORAPOOL_SCREENSHOTS")
    async with chromium() as browser:
        for name in ("owner", "acme"):
            page = await opened(browser, url, name, color_scheme=scheme)
            for path in OWNER if name == "owner" else ("", "failures", "bill"):
                await page.goto(f"{url}/console/{path}?{MONTH}")
                assert await page.evaluate(CONTRAST) == [], path
                assert await page.evaluate(LABELS) == [], path
                for width in (1280, 390):
                    await page.set_viewport_size({"width": width, "height": 860})
                    assert await page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
                await page.set_viewport_size({"width": 1280, "height": 860})
                if pictures and path in ("", "adapter/acme/tone"):
                    label = "owner" if name == "owner" else "tenant"
                    part = "" if path == "" else "-adapter"
                    if part and (scheme, name) != ("light", "owner"):
                        continue
                    file = Path(pictures) / f"console-{label}{part}-{scheme}.png"
                    file.parent.mkdir(exist_ok=True)
                    await page.screenshot(path=file, full_page=True)

"""Templates, and how numbers, amounts, times and names are written.

Names may come from tenants and clients: every value is escaped, and characters that change the direction of text or
are invisible are shown as their code points.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorapool_ledger.reports.money import plain

_HIDDEN = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)


def visible(text: object) -> object:
    """The text with controls, invisible characters and marks of direction as `[U+202E]`."""
    if isinstance(text, Markup) or not isinstance(text, str):
        return text
    return _HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def count(value: int | float | Decimal) -> str:
    """A whole number with separators: 1,234,567."""
    return f"{int(value):,}"


def short(value: float | Decimal | int) -> str:
    """A number for the axis of a chart: 950, 12.3k, 4.5M."""
    number = float(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def amount_text(value: Decimal, currency: str = "") -> str:
    """An amount for people: two digits after the point, and three significant ones below 1."""
    below_one = value != 0 and abs(value) < 1
    places = min(12, max(2, 2 - value.adjusted())) if below_one else 2
    text = f"{value.quantize(Decimal(1).scaleb(-places), rounding=ROUND_HALF_EVEN):,f}"
    return f"{text} {currency}".rstrip()


def money(value: Decimal, currency: str = "") -> Markup:
    """The same, with the exact value for programs."""
    return Markup('<data value="{}">{}</data>').format(plain(value), amount_text(value, currency))


def tokens(value: int) -> Markup:
    """A count with the plain number for programs."""
    return Markup('<data value="{}">{}</data>').format(int(value), count(value))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value < 0.995 or value >= 1.005 else "100 %"


def size(value: float) -> str:
    """Bytes, in binary units."""
    number = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Such as 350 ms, 12.5 s, 3 min 20 s, 2 h 5 min, 4 d 3 h."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, one, two in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {one} {rest} {two}" if rest else f"{whole // large} {one}"
    raise AssertionError


def when(unix_s: float | None) -> Markup:
    """A UTC time; a dash if there is none."""
    if not unix_s:
        return Markup("–")
    found = datetime.fromtimestamp(unix_s, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        found.strftime("%Y-%m-%dT%H:%M:%SZ"), found.strftime("%Y-%m-%d %H:%M:%S")
    )


def name(text: str) -> Markup:
    """A name in isolation, so that the direction of its text changes nothing around it."""
    return Markup("<bdi>{}</bdi>").format(visible(text) if text else "–")


def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("lorapool_ledger.console"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        count=count,
        money=money,
        tokens=tokens,
        percent=percent,
        size=size,
        duration=duration,
        when=when,
        name=name,
        short=short,
    )
    return made


def render(templates: Environment, template: str, context: dict[str, Any]) -> str:
    return templates.get_template(template).render(context)

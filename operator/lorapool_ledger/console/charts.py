"""Charts as inline SVG that the server draws: bars by day, stacked. Colours are classes of the style sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from markupsafe import Markup

from lorapool_ledger.console.render import short

WIDTH, HEIGHT = 560, 190
LEFT, TOP, BOTTOM = 46, 8, 22


@dataclass(frozen=True, slots=True)
class Series:
    """One part of every bar."""

    label: str
    values: Sequence[float | int | Decimal]


def bars(title: str, labels: Sequence[str], series: Sequence[Series], write: Callable[[float], str] = short) -> Markup:
    """One stacked bar for each label. `write` makes the text of a value."""
    totals = [sum(float(one.values[place]) for one in series) for place in range(len(labels))]
    top = _rounded_up(max(totals, default=0.0))
    plot_width, plot_height = WIDTH - LEFT, HEIGHT - TOP - BOTTOM
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title),
    ]
    for step in range(5):
        value, y = top * step / 4, TOP + plot_height * (1 - step / 4)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH, y, y)
            + Markup('<text class="axis" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                LEFT - 7, y + 4, short(value)
            )
        )
    slot = plot_width / max(1, len(labels))
    width = min(28.0, slot * 0.74)
    every = max(1, -(-len(labels) // 8))
    for place, label in enumerate(labels):
        x, y = LEFT + slot * place + (slot - width) / 2, float(TOP + plot_height)
        said = "; ".join(f"{one.label} {write(float(one.values[place]))}" for one in series)
        parts.append(Markup("<g><title>{}: {}</title>").format(label, said))
        for number, one in enumerate(series):
            height = plot_height * float(one.values[place]) / top if top else 0.0
            y -= height
            if height > 0:
                parts.append(
                    Markup('<rect class="part{}" x="{:.1f}" y="{:.2f}" width="{:.1f}" height="{:.2f}"/>').format(
                        number, x, y, width, height
                    )
                )
        parts.append(
            Markup('<rect class="target" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/></g>').format(
                LEFT + slot * place, TOP, slot, plot_height
            )
        )
        if place % every == 0:
            parts.append(
                Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                    x + width / 2, HEIGHT - 7, label[5:] if label[:2] == "20" else label
                )
            )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def meter(share: float, label: str) -> Markup:
    """A bar that is filled up to this share, 0 to 1."""
    filled = max(0.0, min(1.0, share)) * 100
    level = "high" if share >= 0.9 else "middle" if share >= 0.7 else "low"
    return Markup(
        '<svg class="meter {}" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<rect class="whole" width="100" height="8"/><rect class="filled" width="{:.1f}" height="8"/></svg>'
    ).format(level, label, filled)


def _rounded_up(value: float) -> float:
    """The next value of 1, 2, 2.5, 4, 5 or 8 times a power of ten, whose quarters are short to write."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * 0.999999)

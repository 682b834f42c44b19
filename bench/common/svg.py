"""Horizontal bar charts as SVG text. Sizes are in pixels; the colours are readable on light and on dark backgrounds.

Deterministic: the same figures give the same bytes, so that committed pictures can be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from common.records import number

LABEL_PX, TARGETS_PX, VALUE_PX, ROW_PX, TOP_PX = 330, 420, 130, 24, 40
INK, OURS, THEIRS, MISSED, MARK = "#57606a", "#1f6feb", "#8c959f", "#cf222e", "#bf8700"


@dataclass(frozen=True, slots=True)
class BarRow:
    label: str
    value: float | None
    """None: an empty row labelled "not run"."""
    low: float | None = None
    high: float | None = None
    """Upper end of the spread, drawn as a line."""
    kind: str = "ours"
    """`ours`, `theirs` or `missed`: the colour."""


def bar_chart(
    title: str, rows: Sequence[BarRow], unit: str, mark: float | None = None, limit: float | None = None
) -> str:
    """Draws the rows. `mark` is a vertical line (a target to be met); `limit` cuts longer bars, which get an arrow."""
    top = max([row.high or row.value or 0.0 for row in rows] + [mark or 0.0]) * 1.02 or 1.0
    top = min(top, limit) if limit else top
    width, height = LABEL_PX + TARGETS_PX + VALUE_PX, TOP_PX + ROW_PX * len(rows) + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<text x="8" y="22" font-size="15" font-weight="600" fill="{INK}">{escape(title)}</text>',
    ]
    for index, row in enumerate(rows):
        out += _row(row, TOP_PX + ROW_PX * index, top, unit)
    if mark is not None:
        x = _x(mark, top)
        out.append(
            f'<line x1="{x}" x2="{x}" y1="{TOP_PX - 6}" y2="{height - 8}" stroke="{MARK}" stroke-dasharray="4 3"/>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def _row(row: BarRow, y: int, top: float, unit: str) -> list[str]:
    middle = y + ROW_PX // 2 + 4
    out = [f'<text x="{LABEL_PX - 8}" y="{middle}" text-anchor="end" fill="{INK}">{escape(row.label)}</text>']
    if row.value is None:
        return [*out, f'<text x="{LABEL_PX + 4}" y="{middle}" fill="{THEIRS}">not run</text>']
    colour = {"ours": OURS, "theirs": THEIRS, "missed": MISSED}[row.kind]
    end = _x(row.value, top)
    out.append(f'<rect x="{LABEL_PX}" y="{y + 4}" width="{end - LABEL_PX:.1f}" height="{ROW_PX - 8}" fill="{colour}"/>')
    if row.low is not None and row.high is not None:
        line = y + ROW_PX // 2
        out.append(f'<line x1="{_x(row.low, top)}" x2="{_x(row.high, top)}" y1="{line}" y2="{line}" stroke="{INK}"/>')
    said = f"{number(row.value)} {unit}".strip() + (" →" if row.value > top else "")
    at = max(end, _x(row.high, top)) if row.high is not None else end
    return [*out, f'<text x="{at + 6:.1f}" y="{middle}" fill="{INK}">{escape(said)}</text>']


def _x(value: float, top: float) -> float:
    return round(LABEL_PX + TARGETS_PX * min(value, top) / top, 1)

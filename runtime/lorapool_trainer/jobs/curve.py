"""The loss curve of a job as an SVG picture for light and dark backgrounds. The same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from lorapool_trainer.jobs.history import Row

WIDTH_PX, HEIGHT_PX, LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 640, 320, 56, 16, 56, 32
INK, TRAINING, VALIDATION = "#57606a", "#8c959f", "#1f6feb"
MAX_POINTS = 1000
TICKS = 4

Point = tuple[float, float]


def loss_curve(title: str, rows: Sequence[Row]) -> str:
    """Training loss of each step and validation loss of each evaluation, over steps."""
    training = _thinned([(row.step, row.train_loss) for row in rows if row.train_loss is not None])
    validation = _thinned([(row.step, row.valid_loss) for row in rows if row.valid_loss is not None])
    top = max([loss for _, loss in (*training, *validation)], default=1.0) * 1.05 or 1.0
    last = max([row.step for row in rows], default=1) or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT_PX}" y="20" font-size="14" font-weight="600" fill="{INK}">{escape(title)}</text>',
        f'<text x="{LEFT_PX}" y="40" fill="{TRAINING}">training loss</text>',
        f'<text x="{LEFT_PX + 100}" y="40" fill="{VALIDATION}">validation loss</text>',
        *_axes(top, last),
        _line(training, top, last, TRAINING, 1),
        _line(validation, top, last, VALIDATION, 2),
        *(
            f'<circle cx="{_x(step, last)}" cy="{_y(loss, top)}" r="3" fill="{VALIDATION}"/>'
            for step, loss in validation
        ),
    ]
    return "\n".join([*filter(None, parts), "</svg>"]) + "\n"


def _thinned(points: list[Point]) -> list[Point]:
    every = -(-len(points) // MAX_POINTS) or 1
    return points[::every] if not points or (len(points) - 1) % every == 0 else [*points[::every], points[-1]]


def _axes(top: float, last: int) -> list[str]:
    lines = []
    for tick in range(TICKS + 1):
        loss, step = top * tick / TICKS, round(last * tick / TICKS)
        y, x = _y(loss, top), _x(step, last)
        lines += [
            f'<line x1="{LEFT_PX}" x2="{WIDTH_PX - RIGHT_PX}" y1="{y}" y2="{y}" stroke="{INK}" stroke-opacity="0.2"/>',
            f'<text x="{LEFT_PX - 6}" y="{y}" dy="4" text-anchor="end" fill="{INK}">{loss:.2f}</text>',
            f'<text x="{x}" y="{HEIGHT_PX - 12}" text-anchor="middle" fill="{INK}">{step}</text>',
        ]
    return lines


def _line(points: Sequence[Point], top: float, last: int, colour: str, width: int) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{_x(step, last)},{_y(loss, top)}" for step, loss in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _x(step: float, last: int) -> float:
    return round(LEFT_PX + (WIDTH_PX - LEFT_PX - RIGHT_PX) * step / last, 1)


def _y(loss: float, top: float) -> float:
    return round(HEIGHT_PX - BOTTOM_PX - (HEIGHT_PX - TOP_PX - BOTTOM_PX) * loss / top, 1)

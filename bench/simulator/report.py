"""Adds up the bases of a simulated day, prints the figures, and draws them as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from simulator.fleet import SLICE_S, WAIT_EDGES_S, Result, Slice
from simulator.pod import TIERS

LEFT_PX, WIDTH_PX, TOP_PX, HEIGHT_PX, LEGEND_PX = 64, 720, 40, 200, 190
INK, GRID = "#57606a", "#d0d7de"
COLOURS = ("#1f6feb", "#bf8700", "#2da44e", "#cf222e")


def add_up(results: Sequence[Result]) -> list[Slice]:
    """Returns the slices of the whole fleet."""
    longest = max(len(result.slices) for result in results)
    return [_sum([r.slices[at] for r in results if at < len(r.slices)]) for at in range(longest)]


def _sum(slices: Sequence[Slice]) -> Slice:
    total = Slice()
    for item in slices:
        total.tiers.update(item.tiers)
        total.waits = [a + b for a, b in zip(total.waits, item.waits, strict=True)]
        for name in ("requests", "pod_s", "moves", "loads", "pod_starts", "cold_requests", "refused", "lost"):
            setattr(total, name, getattr(total, name) + getattr(item, name))
        total.spread_adapters += item.spread_adapters
        total.busiest = max(total.busiest, item.busiest)
        total.mean_in_flight += item.mean_in_flight / len(slices)
    return total


def wait_below_s(waits: Sequence[int], share: float) -> float:
    """Returns the bound that this share of the requests waited at most; infinite above the last bound."""
    left = share * sum(waits)
    for count, edge in zip(waits, (*WAIT_EDGES_S, float("inf")), strict=True):
        left -= count
        if left <= 0:
            return edge
    return float("inf")


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: str


def figures(results: Sequence[Result], adapters: int, start_s: float) -> list[Figure]:
    """Returns what a simulated time came to."""
    total = _sum(add_up(results))
    served = max(1, sum(total.tiers.values()))
    seconds = len(add_up(results)) * SLICE_S
    used = sum(result.adapters_used for result in results)
    hours, dedicated = total.pod_s / 3600, sum(result.dedicated_s for result in results) / 3600
    found = [
        Figure("requests", f"{total.requests:,} for {used:,} of {adapters:,} adapters"),
        *(Figure(f"adapter was found in: {tier}", f"{100 * total.tiers[tier] / served:.2f} %") for tier in TIERS),
        Figure("loads", f"{total.loads:,}"),
        Figure("of them on another pod than the load before (moves)", f"{total.moves:,}"),
        *(
            Figure(f"waited at most, of all requests {100 * share:g} %", _seconds(wait_below_s(total.waits, share)))
            for share in (0.5, 0.9, 0.99, 0.999, 0.9999)
        ),
        Figure(f"pods started (about {start_s:g} s each)", f"{total.pod_starts:,}"),
        Figure("requests that waited for the start of a pod", f"{total.cold_requests:,}"),
        Figure("refusals of full pods, each tried again", f"{total.refused:,}"),
        Figure("requests cut off by the loss of a pod", f"{total.lost:,}"),
        Figure("most requests in flight on one pod", f"{total.busiest:,}"),
        Figure("GPU-hours", f"{hours:,.0f}"),
        Figure("GPU-hours with one deployment per fine-tune that scales to zero", f"{dedicated:,.0f}"),
        Figure("GPU-hours with one deployment per fine-tune that is always on", f"{adapters * seconds / 3600:,.0f}"),
    ]
    return found


def _seconds(value: float) -> str:
    return f"over {WAIT_EDGES_S[-1]:g} s" if value == float("inf") else f"{value:g} s"


def table(found: Iterable[Figure]) -> str:
    """Returns a Markdown table."""
    return "| | |\n|---|---:|\n" + "".join(f"| {item.name} | {item.value} |\n" for item in found)


def plots(slices: Sequence[Slice]) -> Mapping[str, str]:
    """Returns the SVG pictures by name."""

    def per_slice(of: Callable[[Slice], float]) -> list[float]:
        return [of(item) for item in slices]

    def share(tier: str) -> list[float]:
        return per_slice(lambda item: 100 * item.tiers[tier] / max(1, sum(item.tiers.values())))

    def wait(part: float) -> list[float]:
        return per_slice(lambda item: min(wait_below_s(item.waits, part), 2 * WAIT_EDGES_S[-1]))

    return {
        "load": line_chart(
            "Requests per second and pods",
            {
                "requests per second": per_slice(lambda item: item.requests / SLICE_S),
                "pods": per_slice(lambda item: item.pod_s / SLICE_S),
            },
        ),
        "tiers": line_chart("Where the adapter of a request was, % of the requests", {t: share(t) for t in TIERS}),
        "waits": line_chart(
            "Time that requests waited before they were computed, seconds (p99, p99.9)",
            {"99 % at most": wait(0.99), "99.9 % at most": wait(0.999)},
        ),
        "spread": line_chart(
            "Requests in flight on one pod, and adapters with more than one preferred replica",
            {
                "busiest pod": per_slice(lambda item: item.busiest),
                "mean pod": per_slice(lambda item: item.mean_in_flight),
                "spread adapters": per_slice(lambda item: item.spread_adapters),
            },
        ),
    }


def line_chart(title: str, series: Mapping[str, Sequence[float]]) -> str:
    """Draws values over the hours of the day. The same values give the same bytes."""
    top = _round_up(max((max(values, default=0.0) for values in series.values()), default=0.0))
    points = max(len(values) for values in series.values())
    hours = points * SLICE_S / 3600
    width, height = LEFT_PX + WIDTH_PX + LEGEND_PX, TOP_PX + HEIGHT_PX + 36
    bottom = TOP_PX + HEIGHT_PX
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<text x="8" y="22" font-size="15" font-weight="600" fill="{INK}">{escape(title)}</text>',
    ]
    for step in range(5):
        y = bottom - HEIGHT_PX * step / 4
        out.append(f'<line x1="{LEFT_PX}" x2="{LEFT_PX + WIDTH_PX}" y1="{y:g}" y2="{y:g}" stroke="{GRID}"/>')
        out.append(f'<text x="{LEFT_PX - 8}" y="{y + 4:g}" text-anchor="end" fill="{INK}">{top * step / 4:g}</text>')
    for step in range(9):
        x = LEFT_PX + WIDTH_PX * step / 8
        label = f"{hours * step / 8:g} h"
        out.append(f'<text x="{x:g}" y="{bottom + 20}" text-anchor="middle" fill="{INK}">{label}</text>')
    for number, (name, values) in enumerate(series.items()):
        colour, y = COLOURS[number], TOP_PX + 12 + 20 * number
        at = " ".join(
            f"{LEFT_PX + WIDTH_PX * (place + 0.5) / points:.1f},{bottom - HEIGHT_PX * min(value, top) / top:.1f}"
            for place, value in enumerate(values)
        )
        out.append(f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out.append(f'<text x="{LEFT_PX + WIDTH_PX + 12}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _round_up(value: float) -> float:
    """Returns the next of 1, 2, 4 or 8 times a power of ten, for the top of an axis."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** (len(f"{int(value)}") - 1) if value >= 1 else 0.1
    while not any(value <= unit * part for part in (1, 2, 4, 8)):
        unit *= 10
    return next(unit * part for part in (1, 2, 4, 8) if value <= unit * part)

"""Plots as inline SVG. Colours and type come from the page's style; sizes are in a plot's own units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 360.0
LABEL = 96.0
LINE = 17.0
NUMBER = 62.0  # room right of the longest bar
BEYOND = 1.25  # how far a plot reaches beyond its longest bar
TICKS = 5


@dataclass(frozen=True)
class Bar:
    """One bar. kind: a class of the style: floor, or s0, s1, ... of a daemon. shown: its number."""

    label: str
    value: float | None
    low: float
    high: float
    kind: str
    shown: str
    failed: bool = False


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def svg(height: float, label: str, parts: Sequence[str], width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


@dataclass(frozen=True)
class Room:
    """Of a plot of bars: its width, that of labels left of the bars, and of numbers right of them."""

    width: float = WIDTH
    label: float = LABEL
    number: float = NUMBER


PLAIN = Room()
WIDE = Room(620.0, 178.0, 222.0)


def bars(label: str, found: Sequence[Bar], room: Room = PLAIN) -> str:
    """Bars from zero, one under the other, with the extremes of the rounds as a thin line.

    A line that is much longer than any bar is cut: it ends in a point.
    """
    most = max((bar.value for bar in found if bar.value is not None), default=1.0) * BEYOND or 1.0
    scale = (room.width - room.label - room.number) / most
    parts = []
    for at, bar in enumerate(found):
        y = at * LINE
        parts.append(text(room.label - 6, y + 12, bar.label, "label", "end"))
        if bar.value is None:
            parts.append(text(room.label, y + 12, bar.shown, "bad" if bar.failed else "label"))
            continue
        parts.append(
            f'<rect x="{room.label:g}" y="{y + 3:.1f}" width="{max(1.0, bar.value * scale):.1f}" height="11"'
            f' rx="1" class="{bar.kind}"><title>{escape(bar.label)}: {escape(bar.shown)}</title></rect>'
        )
        high = room.label + min(bar.high, most) * scale
        if bar.high > bar.low:
            parts.append(line(room.label + bar.low * scale, high, y + 8.5, "spread"))
        if bar.high > most:
            parts.append(f'<circle cx="{high:.1f}" cy="{y + 8.5:.1f}" r="1.8" class="cut"/>')
        parts.append(text(high + 5, y + 12, bar.shown, "number"))
    return svg(len(found) * LINE + 2, label, parts, room.width)


def line(x1: float, x2: float, y: float, kind: str) -> str:
    """A level one."""
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="{kind}"/>'


@dataclass(frozen=True)
class Marks:
    """One line of a logarithmic plot: values from small to large, each with its name."""

    label: str
    values: Sequence[tuple[str, float]]
    kind: str


def ticks(low: float, high: float) -> list[float]:
    """Powers of ten that a logarithmic axis from low to high shows, not many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = -(-(last - first) // (TICKS - 1))
    return [10.0**n for n in range(first, last + step, step)]


def duration(us: float) -> str:
    """For an axis."""
    for limit, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")):
        if us >= limit:
            return f"{us / limit:g} {unit}"
    return f"{us * 1e3:g} ns"


def marks(label: str, found: Sequence[Marks]) -> str:
    """Percentiles, in microseconds, on a logarithmic axis; a line for each daemon."""
    values = [value for one in found for _, value in one.values if value > 0]
    if not values:
        return ""
    axis = ticks(min(values), max(values))
    low, high = math.log10(axis[0]), math.log10(axis[-1])
    right = WIDTH - 18

    def place(value: float) -> float:
        return LABEL + (math.log10(value) - low) / (high - low) * (right - LABEL)

    bottom = len(found) * LINE + 4
    parts = []
    for tick in axis:
        x = place(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom:g}" class="grid"/>')
        parts.append(text(x, bottom + 12, duration(tick), "tick", "middle"))
    for at, one in enumerate(found):
        y = at * LINE + 9
        shown = [(name, value) for name, value in one.values if value > 0]
        parts.append(text(LABEL - 6, y + 3.5, one.label, "label", "end"))
        parts.append(line(place(shown[0][1]), place(shown[-1][1]), y, f"reach {one.kind}"))
        for name, value in shown:
            parts.append(
                f'<circle cx="{place(value):.1f}" cy="{y:g}" r="{4.5 if name == "p50" else 3:g}"'
                f' class="{one.kind}"><title>{escape(one.label)} {name}: {value:,.1f} µs</title></circle>'
            )
    return svg(bottom + 16, label, parts)


@dataclass(frozen=True)
class Series:
    """Values by depth."""

    label: str
    points: Sequence[tuple[int, float]]
    kind: str


def curves(label: str, found: Sequence[Series]) -> str:
    """Throughput by queue depth, from zero; depths at equal distances."""
    depths = sorted({depth for one in found for depth, _ in one.points})
    most = max((value for one in found for _, value in one.points), default=1.0) or 1.0
    left, right, top, bottom = 46.0, WIDTH - 66, 8.0, 118.0
    step = (right - left) / max(1, len(depths) - 1)

    def x(depth: int) -> float:
        return left + depths.index(depth) * step

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top)

    parts = []
    for share in (0.0, 0.5, 1.0):
        at = y(most * share)
        parts.append(line(left, right, at, "grid"))
        parts.append(text(left - 5, at + 3.5, short(most * share), "tick", "end"))
    parts += [text(x(depth), bottom + 14, str(depth), "tick", "middle") for depth in depths]
    parts.append(text((left + right) / 2, bottom + 28, "operations under way", "tick", "middle"))
    ends = apart([y(one.points[-1][1]) for one in found])
    for one, end in zip(found, ends, strict=True):
        path = " ".join(f"{x(depth):.1f},{y(value):.1f}" for depth, value in one.points)
        parts.append(f'<polyline points="{path}" class="curve {one.kind}"/>')
        parts += [f'<circle cx="{x(depth):.1f}" cy="{y(value):.1f}" r="3" class="{one.kind}">'
                  f"<title>{escape(one.label)}, depth {depth}: {value:,.0f}/s</title></circle>"
                  for depth, value in one.points]  # fmt: skip
        parts.append(text(right + 7, end + 3.5, one.label, "label"))
    return svg(bottom + 32, label, parts)


def apart(places: Sequence[float], least: float = 12.0) -> list[float]:
    """The same places, moved so that labels there do not overlap."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda at: places[at])
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved


def short(value: float) -> str:
    """A number for an axis."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"

"""Figures as inline SVG, in the colours and the letters of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dreamquant.report.distributions import Histogram
from dreamquant.report.words import number

WIDTH, HEIGHT = 400, 215  # of the view box, and so of the letters' size
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 14, 42
LEAST = 1.2  # height of a bar of anything at all
MARKS = ("circle", "square", "diamond")  # of lines, so that they need no colour to be told apart


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` at `start` to `end` of the view box, by their logarithms if so wished."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)


@dataclass(frozen=True)
class Line:
    """A named line through values, one for each place."""

    name: str
    values: tuple[float, ...]


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most so many: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], and others between them where that are fewer than two."""
    found = [10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
    return found if len(found) > 1 else nice_ticks(low, high)


def histogram(found: Histogram, axis: str, title: str) -> Markup:
    """Bars, the range that rounding reaches as a band, the levels as lines; what lies outside stands out."""
    x = Axis(found.low, found.high, LEFT, WIDTH - RIGHT)
    top = max(found.shares, default=0.0) or 1.0
    y = Axis(0.0, 100 * top, HEIGHT - BOTTOM, TOP)
    first, last = (x.at(end) for end in found.ends)
    band = f'<rect class="band" x="{first:.1f}" y="{TOP}" width="{last - first:.1f}" height="{HEIGHT - BOTTOM - TOP}"/>'
    lines = "".join(f"M{x.at(level):.1f} {HEIGHT - BOTTOM}V{TOP}" for level in found.levels)
    inside: list[str] = []
    outside: list[str] = []
    for index, share in enumerate(found.shares):
        if share:
            left = found.low + index * found.width
            within = found.ends[0] <= left + found.width / 2 <= found.ends[1]
            (inside if within else outside).append(
                _bar(x.at(left), x.at(left + found.width), min(y.at(100 * share), y.start - LEAST))
            )
    bars = f'<path class="bars" d="{"".join(inside)}"/>' + (
        f'<path class="bars outside" d="{"".join(outside)}"/>' if outside else ""
    )
    return _figure(title, band + bars + f'<path class="levels" d="{lines}"/>' + _frame(x, y, axis, "% of values"))


def lines(found: Sequence[Line], axis: str, unit: str, title: str) -> Markup:
    """Lines over places 1, 2, ..., each with a mark and a name of its own."""
    count = max(len(line.values) for line in found)
    x = Axis(1, max(count, 2), LEFT + 8, WIDTH - RIGHT - 8)
    y = Axis(0.0, max(max(line.values) for line in found) or 1.0, HEIGHT - BOTTOM, TOP + 18)
    parts, left = [], float(LEFT)
    for index, line in enumerate(found):
        places = [(x.at(place), y.at(value)) for place, value in enumerate(line.values, start=1)]
        shape = MARKS[index % len(MARKS)]
        path = " ".join(f"{one:.1f},{other:.1f}" for one, other in places)
        marks = "".join(_mark(shape, one, other) for one, other in places)
        parts.append(f'<g class="line line{index}"><polyline points="{path}"/>{marks}{_mark(shape, left + 4, TOP - 4)}</g>')
        parts.append(f'<text class="legend" x="{left + 12:.1f}" y="{TOP}">{escape(line.name)}</text>')
        left += 30 + 6.6 * len(line.name)
    ticks = [tick for tick in nice_ticks(1, max(count, 2)) if tick == round(tick)]
    return _figure(title, "".join(parts) + _frame(x, y, axis, unit, xticks=ticks if count > 1 else [1]))


def frontier(points: Sequence[tuple[float, float]], chosen: tuple[float, float], title: str) -> Markup:
    """(average bits, damage in nats) of the best choices, and the one that was taken; damage by its logarithm."""
    known = [damage for _, damage in [*points, chosen] if damage > 0]
    least, most = min(known, default=1e-6), max(known, default=1.0)
    bits = [average for average, _ in [*points, chosen]]
    x = Axis(math.floor(min(bits)), math.ceil(max(bits)) or 1, LEFT, WIDTH - RIGHT)
    y = Axis(least / 1.5, most * 1.5, HEIGHT - BOTTOM, TOP, log=True)
    places = [(x.at(average), y.at(max(damage, least))) for average, damage in sorted(points)]
    path = " ".join(f"{one:.1f},{other:.1f}" for one, other in places)
    at, height = x.at(chosen[0]), y.at(max(chosen[1], least))
    shift, anchor = (-10, "end") if at > WIDTH * 0.7 else (10, "start")
    body = [f'<g class="line line0"><polyline points="{path}"/>', *(_mark("circle", *place) for place in places), "</g>"]
    body.append(f'<circle class="chosen" cx="{at:.1f}" cy="{height:.1f}" r="6"/>')
    body.append(
        f'<text class="chosen" x="{at + shift:.1f}" y="{height - 9:.1f}" text-anchor="{anchor}">'
        f"chosen: {number(chosen[0])} bits, {number(chosen[1])}</text>"
    )
    return _figure(title, "".join(body) + _frame(x, y, "average bits", "damage, nats", yticks=decades(y.low, y.high)))


def interval(low: float, middle: float, high: float, title: str) -> Markup:
    """An estimate on a line of points of accuracy: the interval as a bar, the estimate as a dot, no loss as a tick."""
    width, height = 220, 34
    x = Axis(min(0.0, low), max(high, 1.0, middle), 8, width - 8)
    ticks = "".join(
        f'<text x="{x.at(tick):.1f}" y="{height - 2}" text-anchor="middle">{number(tick)}</text>'
        for tick in nice_ticks(x.low, x.high, 5)
    )
    return _figure(
        title,
        f'<path class="axis" d="M{x.start} 12H{x.end}M{x.at(0):.1f} 6V18"/>'
        f'<rect class="span" x="{x.at(low):.1f}" y="8" width="{max(x.at(high) - x.at(low), 1):.1f}" height="8" rx="4"/>'
        f'<circle class="dot" cx="{x.at(middle):.1f}" cy="12" r="5"/>{ticks}',
        width=width,
        height=height,
    )


def _bar(left: float, right: float, top: float) -> str:
    return f"M{left:.1f} {HEIGHT - BOTTOM}V{top:.1f}H{right:.1f}V{HEIGHT - BOTTOM}z"


def _mark(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
    if shape == "square":
        return f'<rect x="{x - 2.4:.1f}" y="{y - 2.4:.1f}" width="4.8" height="4.8"/>'
    return f'<path d="M{x - 3.2:.1f} {y:.1f}l3.2 -3.2l3.2 3.2l-3.2 3.2z"/>'


def _frame(
    x: Axis,
    y: Axis,
    across: str,
    upwards: str,
    *,
    xticks: Sequence[float] | None = None,
    yticks: Sequence[float] | None = None,
) -> str:
    """Axes with ticks and names."""
    parts = [f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']
    for tick in nice_ticks(x.low, x.high) if xticks is None else xticks:
        at = x.at(tick)
        parts.append(f'<path class="axis" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>')
    for tick in nice_ticks(y.low, y.high, 5) if yticks is None else yticks:
        at = y.at(tick)
        parts.append(f'<path class="axis" d="M{LEFT - 4} {at:.1f}h4"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="what" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(across)}</text>')
    parts.append(
        f'<text class="what" x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">'
        f"{escape(upwards)}</text>"
    )
    return "".join(parts)


def _figure(title: str, body: str, *, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    name = escape(title)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}"><title>{name}</title>{body}</svg>')

"""Charts as inline SVG, drawn for a page that has the classes and the colour variables of html_template.html.j2.

Lines carry their numbers in a `data-chart` attribute: the page's script reads them for its hover.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 188
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 24
MOST_POINTS = 400  # more than the pixels of a chart: thinned out


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: y of each x, None where there is a gap. colour: a CSS variable's name without the dashes."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    colour: str = "after"


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled chart. log: decades. level: a dashed line (name, y). mark: a dotted upright (name, x). band: y -+ of the
    first line. floor, ceiling: the axis goes at least so far. percent: y are shares."""

    title: str
    lines: tuple[Line, ...]
    note: str = ""
    log: bool = False
    percent: bool = False
    level: tuple[str, float] | None = None
    mark: tuple[str, float] | None = None
    band: tuple[float | None, ...] = ()
    floor: float | None = None
    ceiling: float | None = None
    x_name: str = "iteration"

    @property
    def last(self) -> str:
        """The last number of the first line, for the chart's head."""
        known = [y for y in self.lines[0].ys if y is not None]
        return number(known[-1], self.percent) if known else ""


class _Axes:
    """Data -> pixels."""

    def __init__(self, chart: Chart) -> None:
        self.log = chart.log
        xs = [x for line in chart.lines for x in line.xs]
        self.x_low, self.x_high = _spread(min(xs), max(xs))
        self.y_low, self.y_high, self.ticks = _log_range(chart) if chart.log else _linear_range(chart)

    def x(self, x: float) -> float:
        return LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, y: float) -> float:
        low, high = (math.log10(self.y_low), math.log10(self.y_high)) if self.log else (self.y_low, self.y_high)
        value = math.log10(max(y, self.y_low)) if self.log else y
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def has_data(chart: Chart) -> bool:
    return any(y is not None for line in chart.lines for y in line.ys)


def line_chart(chart: Chart) -> Markup:
    """The SVG of a chart that `has_data`."""
    axes = _Axes(chart)
    lines = [_thinned(line) for line in chart.lines] if not chart.band else list(chart.lines)
    hover = {
        "xName": chart.x_name,
        "percent": chart.percent,
        "lines": [
            {
                "name": line.name,
                "colour": line.colour,
                "points": [
                    [x, y, round(axes.x(x), 1), round(axes.y(y), 1)]
                    for x, y in zip(line.xs, line.ys, strict=True)
                    if y is not None
                ],
            }
            for line in lines
        ],
    }
    body = [*_grid(chart, axes), *_marks(chart, axes), *_band(chart, axes)]
    body += [
        Markup('<path class="line" d="{}" stroke="var(--{})"/>').format(_path(ln, axes), ln.colour) for ln in lines
    ]
    body += [dot for line in lines for dot in _lone_points(line, axes)]
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-chart="{}">{}'
        '<line class="guide" y1="{}" y2="{}"/></svg>'
    ).format(WIDTH, HEIGHT, _in_words(chart), json.dumps(hover), Markup("").join(body), TOP, HEIGHT - BOTTOM)


def dumbbell(before: float | None, after: float | None) -> Markup:
    """Two dots on a scale from 0 to 1: hollow before, filled after."""
    width, middle = 150, 9
    xs = [None if share is None else 7 + share * (width - 14) for share in (before, after)]
    body = [Markup('<line class="rail" x1="7" x2="{}" y1="{}" y2="{}"/>').format(width - 7, middle, middle)]
    if xs[0] is not None and xs[1] is not None:
        body.append(
            Markup('<line class="way" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(xs[0], xs[1], middle, middle)
        )
    for name, x in zip(("before", "after"), xs, strict=True):
        if x is not None:
            body.append(Markup('<circle class="{}" cx="{:.1f}" cy="{}" r="4.5"/>').format(name, x, middle))
    return Markup(
        '<svg class="dumbbell" viewBox="0 0 {} 18" width="{}" height="18" aria-hidden="true">{}</svg>'
    ).format(width, width, Markup("").join(body))


def number(value: float | None, percent: bool = False) -> str:
    """Short: three significant digits, or all that stand before the point; a true minus sign, as a page sets it."""
    return "–" if value is None else _plain(value, percent).replace("-", "−")


def _plain(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.1f}%"
    if value == round(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _spread(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _values(chart: Chart) -> list[float]:
    values = [y for line in chart.lines for y in line.ys if y is not None]
    first = chart.lines[0].ys
    for y, half in zip(first, chart.band, strict=False):
        if y is not None and half is not None:
            values += [y - half, y + half]
    if chart.level is not None:
        values.append(chart.level[1])
    return values


def _linear_range(chart: Chart) -> tuple[float, float, list[float]]:
    values = _values(chart)
    low, high = min(values), max(values)
    low = low if chart.floor is None else min(low, chart.floor)
    high = high if chart.ceiling is None else max(high, chart.ceiling)
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    step = _nice((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * k for k in (1, 2, 2.5, 5, 10) if step <= power * k * (1 + 1e-9))


def _log_range(chart: Chart) -> tuple[float, float, list[float]]:
    """Whole decades around the positive values; a 0 sits on the floor."""
    values = [v for v in _values(chart) if v > 0] or [1e-9]
    low = max(math.floor(math.log10(min(values)) + 1e-9), -307)  # 10.0**-324 is 0, which has no logarithm
    high = max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)
    stride = max(1, math.ceil((high - low) / 5))
    return 10.0**low, 10.0**high, [10.0**k for k in range(low, high + 1, stride)]


def _grid(chart: Chart, axes: _Axes) -> list[Markup]:
    parts = []
    for tick in axes.ticks:
        y = axes.y(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 3.5, _tick(tick, chart, axes))
        )
    for x in _x_ticks(axes):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(
                axes.x(x), HEIGHT - 7, x
            )
        )
    return parts


def _tick(tick: float, chart: Chart, axes: _Axes) -> Markup:
    if chart.log:
        exponent = str(round(math.log10(tick))).replace("-", "−")
        return Markup('10<tspan dy="-4" font-size="7.5">{}</tspan>').format(exponent)
    step = (axes.ticks[1] - axes.ticks[0]) * (100 if chart.percent else 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if _is_quarter(step) else 0)
    value = tick * (100 if chart.percent else 1)
    return Markup(escape(f"{0.0 if abs(value) < step / 1e6 else value:,.{digits}f}{'%' if chart.percent else ''}"))


def _is_quarter(step: float) -> bool:
    """2.5, 0.25, ...: the steps that need one more digit than their size says; 25 and up do not."""
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    return abs(mantissa - 2.5) < 1e-6 and step < 10


def _x_ticks(axes: _Axes) -> list[float]:
    step = max(1.0, _nice((axes.x_high - axes.x_low) / 5))
    step = 3.0 if step == 2.5 else step
    first = math.ceil(axes.x_low / step - 1e-9)
    return [k * step for k in range(first, math.floor(axes.x_high / step + 1e-9) + 1)]


def _marks(chart: Chart, axes: _Axes) -> list[Markup]:
    parts = []
    if chart.level is not None:
        name, at = chart.level
        parts.append(
            Markup(
                '<line class="level" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="mark" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, axes.y(at), axes.y(at), WIDTH - RIGHT, axes.y(at) + 11, name)
        )
    if chart.mark is not None and axes.x_low <= chart.mark[1] <= axes.x_high:
        name, at = chart.mark
        left = axes.x(at) < WIDTH / 2
        parts.append(
            Markup(
                '<line class="upright" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
                '<text class="mark" x="{:.1f}" y="{}" text-anchor="{}">{}</text>'
            ).format(
                axes.x(at), axes.x(at), TOP, HEIGHT - BOTTOM, axes.x(at) + (5 if left else -5), HEIGHT - BOTTOM - 6,
                "start" if left else "end", name,
            )
        )  # fmt: skip
    return parts


def _band(chart: Chart, axes: _Axes) -> list[Markup]:
    if not chart.band:
        return []
    line = chart.lines[0]
    edges = [
        (axes.x(x), axes.y(y - half), axes.y(y + half))
        for x, y, half in zip(line.xs, line.ys, chart.band, strict=True)
        if y is not None and half is not None
    ]
    corners = [f"{x:.1f},{low:.1f}" for x, low, _ in edges] + [f"{x:.1f},{high:.1f}" for x, _, high in reversed(edges)]
    return [Markup('<polygon class="band" points="{}"/>').format(" ".join(corners))]


def _path(line: Line, axes: _Axes) -> str:
    """SVG path data; a gap lifts the pen."""
    steps, down = [], False
    for x, y in zip(line.xs, line.ys, strict=True):
        if y is not None:
            steps.append(f"{'L' if down else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}")
        down = y is not None
    return "".join(steps)


def _lone_points(line: Line, axes: _Axes) -> list[Markup]:
    """A path does not show a point without neighbours, such as the first iteration of a run."""
    known = [y is not None for y in line.ys]
    padded = [False, *known, False]
    return [
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="var(--{})"/>').format(axes.x(x), axes.y(y), line.colour)
        for i, (x, y) in enumerate(zip(line.xs, line.ys, strict=True))
        if y is not None and not padded[i] and not padded[i + 2]
    ]


def _thinned(line: Line) -> Line:
    """At most about MOST_POINTS points; of each stretch the lowest and the highest stay, so that no peak is lost."""
    if len(line.xs) <= MOST_POINTS:
        return line
    size = math.ceil(2 * len(line.xs) / MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(line.xs), size):
        known = [(y, i) for i, y in enumerate(line.ys[start : start + size], start) if y is not None]
        kept += sorted({min(known)[1], max(known)[1]}) if known else [start]
    return Line(line.name, tuple(line.xs[i] for i in kept), tuple(line.ys[i] for i in kept), line.colour)


def _in_words(chart: Chart) -> str:
    known = [y for y in chart.lines[0].ys if y is not None]
    return (
        f"{chart.title}: from {number(known[0], chart.percent)} to {number(known[-1], chart.percent)}" if known else ""
    )


def shares(parts: Sequence[tuple[str, float]]) -> list[tuple[str, float, float]]:
    """(name, amount) -> (name, amount, share of the sum), without those that are 0."""
    total = sum(amount for _, amount in parts)
    return [(name, amount, amount / total) for name, amount in parts if amount > 0]

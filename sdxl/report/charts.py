"""Charts as SVG inside a page, in the page's own colours and font.

Knows lines and axes; does not know what they mean.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from sdxl.report.markup import Html, tag

Colour = Literal["one", "two", "three", "soft", "mark"]
"""Names of colours in the page's style."""

_WIDTH, _HEIGHT = 288, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 9, 6, 15, 28
"""Margins around the drawn lines, without the numbers at their left."""
_FONT = 9
_DIGIT = 0.56 * _FONT
"""About the width of a digit."""
_MOST_TICKS = 8
"""Numbers along an axis."""
_MOST_POINTS = 300
"""Points of a line. More cannot be told apart at this size."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    """As many as `xs`. Numbers that are not finite leave gaps."""
    colour: Colour
    kind: Literal["line", "both", "rings"] = "line"
    """A line, a line with its points, or hollow points."""
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a chart shows."""

    name: str
    """Letters and hyphens; different for each chart of a page."""
    title: str
    explained: str
    """What it shows, for people who cannot see it too."""
    lines: Sequence[Line]
    level: float | None = None
    """A height to compare with."""
    marks: Sequence[tuple[float, str]] = ()
    """Moments along the axis, with their names."""
    logarithmic: bool = False
    """Whether the axis of heights is logarithmic. All finite heights must be above 0 then."""
    from_zero: bool = False
    """Whether the axis of heights begins at 0."""


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Numbers along one side of a chart: which there are, and where."""

    low: float
    high: float
    ticks: Sequence[float]
    labels: Sequence[str]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far along the axis `value` is: 0 at its low end and 1 at its high end."""
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """A line with at most `_MOST_POINTS` points: the means of neighbours."""
    size = -(-len(xs) // _MOST_POINTS)
    if size < 2:
        return list(xs), list(ys)
    starts = range(0, len(xs), size)
    means = [
        [sum(values[start : start + size]) / len(values[start : start + size]) for start in starts]
        for values in (xs, ys)
    ]
    return means[0], means[1]


def svg(chart: Chart) -> Html:
    """The chart as an `<svg>` element, whose colours and font are those of the page."""
    steps, heights = _axes(chart)
    left = _LEFT + _DIGIT * max(map(len, heights.labels))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return round(left + steps.share(value) * (right - left), 2)

    def y(value: float) -> float:
        return round(bottom - heights.share(value) * (bottom - _TOP), 2)

    return tag(
        "svg",
        tag("title", chart.title, id=f"{chart.name}-title"),
        tag("desc", chart.explained, id=f"{chart.name}-desc"),
        *(_across(left, right, y(at), opacity=0.25) for at in heights.ticks),
        *(
            _text(label, left - 5, y(at) + _FONT / 3, anchor="end")
            for at, label in zip(heights.ticks, heights.labels, strict=True)
        ),
        *(
            _text(label, x(at), bottom + 11, anchor="middle")
            for at, label in zip(steps.ticks, steps.labels, strict=True)
        ),
        _text("step", right, _HEIGHT - 2, anchor="end"),
        _across(left, right, y(chart.level), stroke_dasharray="4 3") if chart.level is not None else Html(),
        *(mark for at, told in chart.marks for mark in _mark(told, x(at), bottom, steps.share(at) > 0.6)),
        *(part for line in chart.lines for part in _line(line, x, y)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        font_size=_FONT,
        role="img",
        aria_labelledby=f"{chart.name}-title {chart.name}-desc",
    )


def _axes(chart: Chart) -> tuple[_Axis, _Axis]:
    """The axes of steps and of heights."""
    xs = [*(x for line in chart.lines for x in line.xs), *(x for x, _ in chart.marks)]
    ys = [y for line in chart.lines for y in line.ys if math.isfinite(y)]
    ys += [chart.level] if chart.level is not None else []
    steps = _linear(*_wider(min(xs), max(xs), 0.02), whole=True)
    if chart.logarithmic:
        return steps, _logarithmic(min(ys) / 1.2, max(ys) * 1.2)
    low, high = _wider(min(ys), max(ys), 0.05)
    return steps, _linear(0 if chart.from_zero else low, high)


def _wider(low: float, high: float, by: float) -> tuple[float, float]:
    more = by * ((high - low) or abs(high) or 1)
    return low - more, high + more


def _linear(low: float, high: float, *, whole: bool = False) -> _Axis:
    """At most `_MOST_TICKS` numbers, whose distance is 1, 2 or 5 times a power of ten."""
    least = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    step = max(step, 1) if whole else step
    ticks = [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decimals = max(0, -math.floor(math.log10(step)))
    labels = [f"{tick:.{decimals}f}" if decimals < 5 else _shortest(tick) for tick in ticks]
    return _Axis(low=low, high=high, ticks=ticks, labels=labels)


def _logarithmic(low: float, high: float) -> _Axis:
    """Powers of ten, and twice and five times them if there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    every = [float(f"{factor}e{power}") for power in powers for factor in factors]
    ticks = [tick for tick in every if low <= tick <= high]
    return _Axis(
        low=low, high=high, ticks=ticks, labels=[_shortest(tick) for tick in ticks], logarithmic=True
    )


def _shortest(number: float) -> str:
    return f"{number:.3g}".replace("e-0", "e-")


def _text(told: str, x: float, y: float, *, anchor: Literal["start", "middle", "end"], **more: str) -> Html:
    return tag("text", told, x=f"{x:.2f}", y=f"{y:.2f}", text_anchor=anchor, **more)


def _across(left: float, right: float, y: float, **more: str | float) -> Html:
    """A level line over the whole chart."""
    style = {name: str(value) for name, value in more.items()}
    return tag("path", d=f"M{left:.2f} {y}H{right}", class_="stroke-soft", stroke_width="0.8", **style)


def _mark(told: str, x: float, bottom: float, at_right: bool) -> Iterator[Html]:
    """A line at a moment, with its name at the side that has room."""
    yield tag(
        "path",
        d=f"M{x} {bottom}V{_TOP}",
        class_="stroke-mark",
        stroke_width="0.9",
        stroke_dasharray="2 2",
    )
    anchor = "end" if at_right else "start"
    yield _text(told, x + (-4 if at_right else 4), _TOP - 3, anchor=anchor, class_="fill-mark")


def _line(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[Html]:
    """The parts of a line between its gaps, and its points."""
    points = zip(*thinned(line.xs, line.ys), strict=True)
    for finite, part in groupby(points, lambda point: math.isfinite(point[1])):
        if not finite:
            continue
        places = [(x(at), y(height)) for at, height in part]
        if line.kind != "rings" and len(places) > 1:
            yield tag(
                "path",
                d="M" + "L".join(f"{at} {height}" for at, height in places),
                fill="none",
                class_=f"stroke-{line.colour}",
                stroke_width="0.8" if line.faint else "1.6",
                stroke_linejoin="round",
                opacity="0.35" if line.faint else None,
            )
        if line.kind == "rings":
            for at, height in places:
                yield tag(
                    "circle",
                    cx=str(at),
                    cy=str(height),
                    r="3.6",
                    fill="none",
                    class_=f"stroke-{line.colour}",
                )
        elif line.kind == "both" or len(places) == 1:
            for at, height in places:
                yield tag("circle", cx=str(at), cy=str(height), r="2.2", class_=f"fill-{line.colour}")

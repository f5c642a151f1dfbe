"""Charts as SVG inside a page, drawn by matplotlib, in the page's own colours and font.

Knows lines and axes; does not know what they mean. Import it only when a page is written: matplotlib takes a second.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdxl.report.markup import Html, escaped

Colour = Literal["one", "two", "three", "soft", "mark"]
"""Names of colours in the page's style."""

_STAND_INS: dict[Colour, str] = {
    "one": "#000001",
    "two": "#000002",
    "three": "#000003",
    "soft": "#000004",
    "mark": "#000005",
}
"""matplotlib needs a colour. Each of these becomes a class, so that the page decides, for dark mode too."""
_INCHES = (4.0, 2.5)
_MOST_POINTS = 300
"""Points of a line. More cannot be told apart at this size."""
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    """As many as `xs`. Numbers that are not finite leave gaps."""
    colour: Colour
    kind: Literal["line", "dots", "both", "rings"] = "line"
    """A line, its points, both, or hollow points."""
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
    from_zero: bool = False
    """Whether the axis of heights begins at 0. All heights must be finite then, and some above 0."""


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
    """The chart as an `<svg>` element without colours, fonts and styles of its own."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 9}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        _draw(figure.add_subplot(), chart)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), chart)


def _draw(axes: Axes, chart: Chart) -> None:
    soft, mark = _STAND_INS["soft"], _STAND_INS["mark"]
    for line in chart.lines:
        xs, ys = thinned(line.xs, [y if math.isfinite(y) else math.nan for y in line.ys])
        alone = len(xs) == 1 and line.kind == "line"
        axes.plot(
            xs,
            ys,
            color=_STAND_INS[line.colour],
            alpha=0.35 if line.faint else 1,
            linewidth=0.8 if line.faint else 1.6,
            linestyle="none" if line.kind in ("dots", "rings") else "-",
            marker="" if line.kind == "line" and not alone else "o",
            markersize=7 if line.kind == "rings" else 3.5,
            fillstyle="none" if line.kind == "rings" else "full",
            zorder=2 if line.faint else 3,
        )
    if chart.logarithmic:
        axes.set_yscale("log")
    if chart.from_zero:
        axes.set_ylim(0, 1.1 * max(max(line.ys) for line in chart.lines))
    axes.margins(x=0.02)
    if chart.level is not None:
        axes.axhline(chart.level, color=soft, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for x, told in chart.marks:
        axes.axvline(x, color=mark, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        right = (x - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0]) > 0.6
        axes.annotate(
            told,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if right else 4, 3),
            textcoords="offset points",
            ha="right" if right else "left",
            va="bottom",
            color=mark,
        )
    axes.set_xlabel("step", color=soft, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(colors=soft, length=0)
    axes.grid(axis="y", color=soft, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _for_page(drawn: bytes, chart: Chart) -> Html:
    """matplotlib's file as an element of a page: styles become attributes and classes, so that the page may forbid inline
    styles; names are those of this chart alone."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(rb"#([\w-]+)", drawn))
    for element in root.iter():
        _without_style(element)
        if (name := element.get("id")) is not None:
            del element.attrib["id"]
            if name.encode() in used:
                element.set("id", f"{chart.name}-{name}")
        for key, value in list(element.attrib.items()):
            element.set(key, re.sub(r"^(url\()?#", rf"\g<1>#{chart.name}-", value))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{chart.name}-title {chart.name}-desc"}
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    start = text.index(">") + 1
    titles = (
        f'<title id="{chart.name}-title">{escaped(chart.title)}</title>'
        f'<desc id="{chart.name}-desc">{escaped(chart.explained)}</desc>'
    )
    return Html(text[:start] + titles + re.sub(r">\s+<", "><", text[start:]))


def _without_style(element: ElementTree.Element) -> None:
    """Turn the declarations of an element's style into attributes; colours become classes, and fonts are left out."""
    classes = []
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        colour = next((key for key, stand_in in _STAND_INS.items() if stand_in == value), None)
        if colour is not None:
            classes.append(f"{name}-{colour}")
        elif name == "font":
            size = re.search(r"[\d.]+px", value)
            element.set("font-size", size[0] if size else "9px")
        elif name:
            element.set(name, value)
    if classes:
        element.set("class", " ".join(classes))

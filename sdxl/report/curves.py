"""The curves of a report: loss, checks, rates, memory and speed over the steps.

Knows the numbers of a history; does not know how a chart is drawn.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from sdxl.history import Check, Step
from sdxl.report.charts import Chart, Colour, Line, svg
from sdxl.report.markup import Html, section, table, tag
from sdxl.report.overview import duration, note
from sdxl.report.told import Told

_BANDS: dict[str, Colour] = {"low": "one", "middle": "two", "high": "three"}
_SMOOTHING = 30
"""The smoothed loss averages over about this part of the run."""
_PARTS_OF_SPEED = 60
"""Speeds are means over so many parts of the run."""
_LOG_FROM = 8
"""Rates that differ by this factor share a logarithmic axis."""
_MOST_CHECKS = 200
"""Rows of the table of checks."""


def curves(told: Told) -> Html:
    """The section with all curves for which the history has numbers; empty if it has none."""
    charts = [*_checks(told), *_previews(told), *_steps(told)]
    if not charts:
        return Html()
    return section(
        "curves",
        "Curves",
        tag("div", *map(_figure, charts), class_="charts"),
        _table(told),
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value averaged with its neighbours, with weights that fall off as a Gaussian."""
    width = max(1.0, len(values) / _SMOOTHING / 2)
    reach = round(3 * width)
    weights = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    result = []
    for place in range(len(values)):
        low, high = max(0, place - reach), min(len(values), place + reach + 1)
        pairs = [
            (weight, value)
            for weight, value in zip(weights[low - place + reach :], values[low:high], strict=False)
            if math.isfinite(value)
        ]
        total = sum(weight for weight, _ in pairs)
        result.append(sum(weight * value for weight, value in pairs) / total if total else math.nan)
    return result


def _figure(chart: Chart) -> Html:
    named = [line for line in chart.lines if not line.faint]
    legend = [
        tag("li", tag("span", class_=f"key key-{line.colour} {line.kind}"), line.label)
        for line in (named if len(named) > 1 else ())
    ]
    return tag(
        "figure",
        tag("h3", chart.title),
        svg(chart),
        tag("ul", *legend, class_="legend") if legend else Html(),
        tag("figcaption", chart.explained),
        class_="chart",
    )


def _checks(told: Told) -> Iterator[Chart]:
    """Held-out loss, drift and score."""
    every = sorted(told.history.checks, key=lambda check: check.step)
    full = [check for check in every if check.strength == 1 or check.step == 0]
    weakened = [check for check in every if check not in full]
    xs = [check.step for check in full]
    marks = _chosen(told)

    def of(value: Callable[[Check], float], colour: Colour) -> list[Line]:
        lines = [Line(label="full strength", xs=xs, ys=[*map(value, full)], colour=colour, kind="both")]
        if weakened:
            points = [check.step for check in weakened]
            others = [*map(value, weakened)]
            lines.append(
                Line(label="other strengths", xs=points, ys=others, colour="soft", kind="rings"),
            )
        chosen = [check for check in every if told.is_chosen(check)]
        if chosen:
            at, heights = [check.step for check in chosen], [*map(value, chosen)]
            lines.append(Line(label="chosen", xs=at, ys=heights, colour="mark", kind="rings"))
        return lines

    if any(math.isfinite(check.score) for check in every):
        yield Chart(
            name="score",
            title="Score",
            explained="What the choice compares. Higher is better.",
            lines=of(lambda check: check.score, "one"),
            marks=marks,
        )
    bands = [band for band in _BANDS if any(band in check.held_out for check in full)]
    if bands:
        lines = [
            Line(
                label=f"{band} noise",
                xs=xs,
                ys=[check.held_out.get(band, math.nan) for check in full],
                colour=_BANDS[band],
                kind="both",
            )
            for band in bands
        ]
        yield Chart(
            name="held-out",
            title="Loss on what was kept out",
            explained="Divided by the base's loss, by band of noise: below 1 is better than the base. "
            "When it rises again, the training learns its pictures by heart.",
            lines=lines,
            level=1.0,
            marks=marks,
        )
    if any(math.isfinite(check.followed) for check in every):
        yield Chart(
            name="followed",
            title="Prompts followed",
            explained="How much of the base's answer to other words in a prompt is left beside the new words. "
            "Near 0, its own pictures come whatever is asked for.",
            lines=of(lambda check: check.followed, "three"),
            marks=marks,
        )
    if any(math.isfinite(check.drift) for check in every):
        yield Chart(
            name="drift",
            title="Drift of other prompts",
            explained="How far predictions for prompts without the new words have moved from the base's, as a share "
            "of what a prompt itself changes. Lower is better.",
            lines=of(lambda check: check.drift, "two"),
            marks=marks,
        )


def _previews(told: Told) -> Iterator[Chart]:
    """What models say that looked at the previews."""
    every = sorted(told.history.previews, key=lambda one: one.step)
    among = told.history.likeness_among_pictures
    compared = "" if among is None else f" The dashed line ({among:.2f}): training pictures among themselves."
    likeness = [(one.step, one.likeness) for one in every if one.likeness is not None]
    shown = [(one.step, one.prompt_shown) for one in every if one.prompt_shown is not None]
    if likeness:
        yield Chart(
            name="likeness",
            title="Likeness of previews",
            explained="How like the training pictures the previews with the new words are: the mean cosine of DINOv2's "
            f"vectors. It is told, and chooses nothing.{compared}",
            lines=[_line("likeness", likeness, "one")],
            level=among,
            marks=_chosen(told),
        )
    if shown:
        yield Chart(
            name="prompt-shown",
            title="Prompts shown in previews",
            explained="How well these previews show their prompts, without the new words: the mean cosine of CLIP's vectors "
            "of picture and text. It is told, and chooses nothing.",
            lines=[_line("prompts shown", shown, "three")],
            marks=_chosen(told),
        )


def _line(label: str, points: Sequence[tuple[int, float]], colour: Colour) -> Line:
    return Line(label=label, xs=[x for x, _ in points], ys=[y for _, y in points], colour=colour, kind="both")


def _steps(told: Told) -> Iterator[Chart]:
    """Loss, rates, memory and speed."""
    steps = told.history.steps
    if not steps:
        return
    xs, losses = [step.step for step in steps], [step.loss for step in steps]
    pivot = [(float(told.pivot), "tokens freeze")] if told.pivot else []
    if any(map(math.isfinite, losses)):
        yield Chart(
            name="loss",
            title="Loss in training",
            explained="Smoothed, with the single steps faint behind it. It falls less than one expects, "
            "since most of it is noise.",
            lines=[
                Line(label="each step", xs=xs, ys=losses, colour="one", faint=True),
                Line(label="smoothed", xs=xs, ys=smoothed(losses), colour="one"),
            ],
            marks=pivot,
        )
    yield _rates(told, steps, xs, pivot)
    speeds = _speeds(steps)
    if speeds:
        yield Chart(
            name="speed",
            from_zero=True,
            title="Steps per second",
            explained=f"All steps took {duration(steps[-1].seconds)}, with what was done between them.",
            lines=[
                Line(
                    label="steps per second",
                    xs=[x for x, _ in speeds],
                    ys=[y for _, y in speeds],
                    colour="two",
                )
            ],
        )
    if any(step.memory_gib > 0 for step in steps):
        most = max(step.memory_gib for step in steps)
        yield Chart(
            name="memory",
            from_zero=True,
            title="GPU memory",
            explained=f"The most that was in use up to each step, in GiB: {most:.1f} at the end.",
            lines=[
                Line(label="peak", xs=xs, ys=[step.memory_gib for step in steps], colour="three"),
            ],
        )


def _rates(
    told: Told, steps: Sequence[Step], xs: Sequence[float], pivot: Sequence[tuple[float, str]]
) -> Chart:
    weights = [step.learning_rate for step in steps]
    rows = [step.ti_learning_rate for step in steps]
    lines = [
        Line(
            label="LoRA" if told.is_lora else "UNet",
            xs=xs,
            ys=weights,
            colour="one",
        )
    ]
    if any(rows):
        lines.append(Line(label="tokens", xs=xs, ys=[rate or math.nan for rate in rows], colour="two"))
    tops = [max(weights), max(rows)]
    logarithmic = min(tops) > 0 and max(tops) > _LOG_FROM * min(tops)
    if logarithmic:  # which has no place for 0
        lines[0] = Line(label=lines[0].label, xs=xs, ys=[rate or math.nan for rate in weights], colour="one")
    return Chart(
        name="rates",
        title="Learning rates",
        explained="Of the weights, and of the token rows up to the step at which they freeze.",
        lines=lines,
        logarithmic=logarithmic,
        marks=pivot,
    )


def _speeds(steps: Sequence[Step]) -> list[tuple[float, float]]:
    """(step, steps per second) as means over parts of the run."""
    size = max(1, len(steps) // _PARTS_OF_SPEED)
    ends = steps[size - 1 :: size]
    return [
        (later.step, (later.step - earlier.step) / (later.seconds - earlier.seconds))
        for earlier, later in pairwise(ends)
        if later.seconds > earlier.seconds
    ]


def _chosen(told: Told) -> list[tuple[float, str]]:
    choice = told.history.choice
    return [(float(choice.step), "chosen")] if choice else []


def _table(told: Told) -> Html:
    """All checks in numbers."""
    checks = told.history.checks
    if not checks:
        return Html()
    bands = [band for band in _BANDS if any(band in check.held_out for check in checks)]
    rows = [
        (
            f"{told.step_name(check.step)}{', chosen' if told.is_chosen(check) else ''}",
            f"{check.strength:g}",
            *(f"{check.held_out[band]:.3f}" if band in check.held_out else "–" for band in bands),
            f"{check.followed:.3f}",
            f"{check.drift:.3f}",
            f"{check.score:.3f}",
        )
        for check in checks[:_MOST_CHECKS]
    ]
    heads = ("moment", "strength", *(f"{band} noise" for band in bands), "followed", "drift", "score")
    left = len(checks) - len(rows)
    return tag(
        "details",
        tag("summary", f"All {len(checks)} checks in numbers"),
        table(heads, rows, class_="numbers"),
        note(f"{left} more are in history.json.") if left else Html(),
    )

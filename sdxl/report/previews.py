"""The previews of a report: prompts as rows, moments of the training as columns, and a slider over them.

Knows pictures by prompt and step; does not know how they were drawn. Without scripts the page shows the whole grid.
"""

from sdxl.history import Previews
from sdxl.report.markup import Html, cut, section, tag
from sdxl.report.overview import note
from sdxl.report.pictures import image, thumbnail
from sdxl.report.told import Told

_MOST_MOMENTS, _MOST_PROMPTS = 14, 12
_SIDE = 384
_BYTES = 4_500_000
"""Of all previews together."""


def previews(told: Told) -> Html:
    """The section with the previews; empty if there are none."""
    every = sorted(told.history.previews, key=lambda one: one.step)
    prompts = told.history.prompts[:_MOST_PROMPTS]
    moments = _kept(told, every)
    if not moments or not prompts:
        return Html()
    most_bytes = _BYTES // (len(moments) * len(prompts))
    rows = [_row(told, number, prompt, moments, most_bytes) for number, prompt in enumerate(prompts)]
    left = len(every) - len(moments), len(told.history.prompts) - len(prompts)
    return section(
        "previews",
        "Previews",
        tag("p", "The same prompts and seeds, drawn at moments of the training."),
        _controls(told, moments),
        tag(
            "div",
            *rows,
            id="strip",
            class_=f"strip {'few' if len(moments) < 7 else 'some' if len(moments) < 10 else 'many'}",
            role="region",
            aria_label="Previews, one row for each prompt",
            tabindex=0,
            data_start=_start(told, moments),
        ),
        note(f"{left[0]} more moments are not shown.") if left[0] else Html(),
        note(f"{left[1]} more prompts are not shown.") if left[1] else Html(),
    )


def _kept(told: Told, every: list[Previews]) -> list[Previews]:
    """At most `_MOST_MOMENTS` moments, evenly spread, with the first, the last and the chosen one."""
    if len(every) <= _MOST_MOMENTS:
        return every
    last = len(every) - 1
    kept = {round(place * last / (_MOST_MOMENTS - 2)) for place in range(_MOST_MOMENTS - 1)}
    kept.add(_nearest(told, every))
    return [every[place] for place in sorted(kept)]


def _nearest(told: Told, moments: list[Previews]) -> int:
    """The place of the moment that is nearest to the chosen one, or else of the last."""
    choice = told.history.choice
    if choice is None:
        return len(moments) - 1
    return min(range(len(moments)), key=lambda place: abs(moments[place].step - choice.step))


def _start(told: Told, moments: list[Previews]) -> int:
    return _nearest(told, moments)


def _controls(told: Told, moments: list[Previews]) -> Html:
    """The slider and its buttons. They stay hidden without scripts, which they need."""
    last = len(moments) - 1
    slider = tag(
        "input",
        type="range",
        id="moment",
        min=0,
        max=last,
        step=1,
        value=_start(told, moments),
        aria_label="Moment of the training",
    )
    return tag(
        "div",
        tag("button", "←", type="button", id="earlier", aria_label="Earlier moment"),
        slider,
        tag("button", "→", type="button", id="later", aria_label="Later moment"),
        tag("output", id="shown", for_="moment"),
        tag("button", "Show all moments", type="button", id="all", aria_pressed="false"),
        id="controls",
        class_="controls",
        hidden=True,
    )


def _row(told: Told, number: int, prompt: str, moments: list[Previews], most_bytes: int) -> Html:
    short = cut(prompt, 300)
    figures = [_figure(told, number, short, place, one, most_bytes) for place, one in enumerate(moments)]
    unchanged = not told.token_map.named_in(prompt)
    remark = tag("small", "names no new word, so it should stay the same") if unchanged else Html()
    return tag(
        "div", tag("h3", tag("bdi", short), remark), tag("div", *figures, class_="moments"), class_="prompt"
    )


def _figure(told: Told, number: int, prompt: str, place: int, one: Previews, most_bytes: int) -> Html:
    choice = told.history.choice
    chosen = choice is not None and choice.step == one.step
    name = told.step_name(one.step)
    try:
        picture = thumbnail(told.folder / one.pictures[number], _SIDE)
    except (OSError, IndexError):
        shown = tag("div", "no picture", class_="missing")
    else:
        shown = image(picture, f"{prompt}, {name}", most_bytes=most_bytes)
    return tag(
        "figure",
        shown,
        tag("figcaption", name, tag("span", "chosen", class_="badge") if chosen else Html()),
        data_moment=place,
        data_step=one.step,
        data_name=f"{name} of {told.total}" if one.step else name,
        data_chosen=chosen,
    )

"""The top of a report: what was trained, on what, for how long, and which moment was chosen.

Knows a training's facts; does not know how they came about.
"""

from sdxl.report.markup import Html, cut, facts, join, tag
from sdxl.report.told import Told


def title(told: Told) -> str:
    """The page's title."""
    return cut(", ".join(told.words), 80)


def overview(told: Told) -> Html:
    """The heading, the facts and the choice."""
    pictures = len(told.pictures)
    what = f"A {told.kind} for {told.base}, learned from {counted(pictures, 'picture')}"
    steps = told.history.steps
    sizes = {picture.framing.target_size for picture in told.pictures}
    side = told.settings.get("resolution")
    shown = {
        "Preset": str(told.settings.get("preset", "")),
        "Steps": _steps(told),
        "Size": f"{side}×{side} pixels" + (f", {len(sizes)} shapes" if len(sizes) > 1 else ""),
        "Time of the steps": duration(steps[-1].seconds) if steps and steps[-1].seconds else "",
        "Checks and previews": duration(told.history.watched_seconds) if told.history.checks else "",
        "Device": str(told.record.get("device", "")),
        "Seed": str(told.settings.get("seed", "")),
    }
    return tag(
        "header",
        tag("p", "Report of a training", class_="over"),
        tag("h1", title(told)),
        tag("p", what, class_="lead"),
        facts(shown),
        _choice(told),
    )


def _steps(told: Told) -> str:
    """How many steps there were, of how many pictures, and how many there should have been if fewer were enough."""
    last = told.history.steps[-1].step if told.history.steps else told.total
    size = int(told.settings.get("train_batch_size", 1)) * int(
        told.settings.get("gradient_accumulation_steps", 1)
    )
    of_all = f"{last} of {told.total} (stopped early)" if last < told.total else f"{last}"
    return f"{of_all}, each of {counted(size, 'picture')}"


def _choice(told: Told) -> Html:
    choice = told.history.choice
    if choice is None:
        return Html()
    strength = "" if choice.strength == 1 else f" at strength {choice.strength:g}"
    where = told.step_name(choice.step).capitalize() + f" of {told.total}{strength} was chosen."
    return tag(
        "div",
        tag("p", tag("strong", where)),
        tag("p", cut(choice.reason, 600)),
        class_="choice",
    )


def navigation(parts: dict[str, str]) -> Html:
    """Links to the parts of the page: name → title."""
    links = (tag("li", tag("a", name, href=f"#{part}")) for part, name in parts.items())
    return tag("nav", tag("ul", *links), aria_label="Parts of this page")


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 picture" or "8 pictures"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def note(*sentences: str) -> Html:
    """A small remark."""
    return tag("p", join(sentences), class_="note")

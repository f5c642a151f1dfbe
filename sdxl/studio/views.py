"""What the page shows as HTML: cards of pictures, progress, previews, curves, links. Texts of strangers are escaped.

Knows elements; does not know events or where anything comes from.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sdxl.history import Previews
from sdxl.report.curves import curves
from sdxl.report.markup import Html, cut, escaped, tag
from sdxl.report.overview import duration
from sdxl.report.pictures import image, mask_layer, thumbnail
from sdxl.report.told import Told
from sdxl.studio.picture_set import Picture, PictureSet
from sdxl.studio.trainings import Progress, Training

_CARD, _PREVIEW = 288, 224
"""Pixels of a thumbnail's longer side."""
_MOST_MOMENTS = 8
"""Previews of so many moments are shown: the first and the last ones."""


def card(pictures: PictureSet, picture: Picture) -> Html:
    """A picture as it will be learned; what its mask leaves out is red."""
    try:
        small = thumbnail(pictures.prepared(picture), _CARD)
    except OSError:
        return tag("div", "no picture", class_="missing")
    layers = [image(small, f"{picture.name}, as it will be learned", most_bytes=30_000)]
    mask = pictures.mask(picture)
    if mask is not None:
        layers.append(
            image(mask_layer(mask, small.size), "What is red counts less", most_bytes=9_000, class_="mask")
        )
    return tag("div", *layers, class_="layers" if picture.used else "layers unused")


def under_card(picture: Picture, word: str) -> Html:
    """Whether the caption names the word, and advice."""
    parts = re.split(rf"(?<!\w)({re.escape(word)})(?!\w)", picture.caption)
    marked = [tag("mark", part) if number % 2 else part for number, part in enumerate(parts)]
    said = (
        tag("p", *marked, class_="caption")
        if len(parts) > 1
        else tag("p", f"{word} is missing here.", class_="warning")
    )
    advice = [tag("p", f"{picture.name} {sentence}", class_="warning") for sentence in picture.advice]
    return tag("div", said, *advice)


def sentences(told: Sequence[str], *, class_: str = "warning") -> Html:
    """A paragraph for each sentence; nothing if there are none."""
    return Html("".join(tag("p", sentence, class_=class_) for sentence in told))


def progress(now: Progress) -> Html:
    """How far a training is, in words and as a bar."""
    share = now.step / now.steps if now.steps else 0
    names = {
        "preparing": "Getting ready …",
        "training": f"Step {now.step} of {now.steps}",
        "done": "Finished",
        "failed": "It did not finish",
    }
    left = now.seconds_left
    text = now.message or (f"About {duration(left)} left." if left is not None else "")
    bar = tag(
        "progress",
        max=100,
        value=100 if now.state == "done" else round(100 * share),
        aria_label="How far the training is",
    )
    return tag(
        "div",
        tag("p", tag("strong", names[now.state]), " ", text),
        bar if now.state != "failed" else Html(),
        class_=f"progress {now.state}",
        role="status",
    )


def previews(now: Progress) -> Html:
    """What the fine-tune draws at several moments: a row for each prompt."""
    moments = now.history.previews
    if not moments:
        return tag("p", "Pictures appear here while it learns.", class_="soft")
    shown = moments if len(moments) <= _MOST_MOMENTS else [moments[0], *moments[1 - _MOST_MOMENTS :]]
    rows = [
        tag(
            "div",
            tag("h3", cut(prompt, 200)),
            tag("div", *(_moment(now.folder, number, prompt, one) for one in shown), class_="moments"),
        )
        for number, prompt in enumerate(now.history.prompts)
    ]
    return tag("div", *rows, class_="previews", tabindex=0, role="region", aria_label="Previews")


def _moment(folder: Path, number: int, prompt: str, one: Previews) -> Html:
    name = "before training" if one.step == 0 else f"step {one.step}"
    try:
        small = thumbnail(folder / one.pictures[number], _PREVIEW)
    except (OSError, IndexError):
        return tag("figure", tag("div", "no picture", class_="missing"), tag("figcaption", name))
    return tag("figure", image(small, f"{prompt}, {name}", most_bytes=16_000), tag("figcaption", name))


def charts(now: Progress, training: Training) -> Html:
    """The curves of a training, as its report has them."""
    if len(now.history.steps) < 2:
        return tag("p", "Curves appear here while it learns.", class_="soft")
    told = Told(
        folder=now.folder, history=now.history, record={"settings": dict(training.resolved)}, pictures=[]
    )
    return curves(told)


def settings_table(resolved: dict[str, object], *, names: Sequence[str]) -> Html:
    """What a preset decided, by the names of the inputs."""
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", str(resolved[name])))
        for name in names
        if resolved.get(name) is not None
    ]
    return tag("table", tag("tbody", *rows), class_="settings")


def links(addresses: dict[str, str], *, class_: str = "links") -> Html:
    """Links: text → address."""
    return tag("p", *(tag("a", text, href=address) for text, address in addresses.items()), class_=class_)


def as_message(text: str) -> str:
    """A sentence for Gradio's notices, which would read it as HTML."""
    return str(escaped(text))


def painted(mask: Image.Image) -> Image.Image:
    """A mask as paint for an editor: orange where it is white."""
    grey = mask.convert("L")
    layer = Image.new("RGBA", grey.size, (255, 120, 40, 255))
    layer.putalpha(grey)
    return layer

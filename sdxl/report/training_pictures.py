"""The training pictures of a report, with captions, masks and crops, and the advice on them.

Knows prepared pictures; does not know how they were prepared.
"""

from sdxl.data.dataset_folder import PreparedPicture
from sdxl.report.markup import Html, cut, section, tag
from sdxl.report.overview import counted, note
from sdxl.report.pictures import image, mask_layer, thumbnail
from sdxl.report.told import Told

_MOST_PICTURES, _MOST_ADVICE = 100, 40
_SIDE = 320
_BYTES = 3_000_000
"""Of all pictures and masks together."""
_MOST_PER_PICTURE = 60_000
_LONGEST_CAPTION = 500
"""Characters, also of a sentence of advice."""
_CUT_A_LITTLE = 0.005
"""A crop that loses less than this share of its picture is not worth a word."""


def training_pictures(told: Told) -> Html:
    """The section with the pictures and the advice; empty if there are none."""
    if not told.pictures:
        return Html()
    shown = told.pictures[:_MOST_PICTURES]
    left = len(told.pictures) - len(shown)
    each = min(_BYTES // len(shown), _MOST_PER_PICTURE)
    masks = any(picture.mask for picture in shown)
    return section(
        "pictures",
        "Training pictures",
        note(
            f"The first {len(shown)} of {len(told.pictures)} pictures. {counted(left, 'more picture')} "
            f"{'is' if left == 1 else 'are'} not shown."
        )
        if left
        else Html(),
        _advice(told),
        tag("input", type="checkbox", id="masks", checked=True) if masks else Html(),
        tag("label", "Show masks: what is red counts less", for_="masks") if masks else Html(),
        tag(
            "div",
            *(_figure(picture, number, each) for number, picture in enumerate(shown, 1)),
            class_="gallery",
        ),
    )


def _figure(picture: PreparedPicture, number: int, most_bytes: int) -> Html:
    caption = cut(picture.caption, _LONGEST_CAPTION)
    try:
        small = thumbnail(picture.picture, _SIDE)
    except OSError:
        return tag("figure", tag("div", "no picture", class_="missing"), tag("figcaption", caption))
    layers = [image(small, f"Picture {number}: {caption}", most_bytes=most_bytes * 3 // 4)]
    if picture.mask is not None:
        mask = mask_layer(picture.mask, small.size)
        layers.append(image(mask, f"The mask of picture {number}", most_bytes=most_bytes // 4, class_="mask"))
    return tag(
        "figure",
        tag("div", *layers, class_="layers"),
        tag("figcaption", tag("bdi", caption or "no caption"), _crop(picture)),
    )


def _crop(picture: PreparedPicture) -> Html:
    """Where the picture lies in its original, drawn and in words."""
    framing = picture.framing
    (height, width), (covered_height, covered_width) = framing.original_size, framing.covered_size
    (top, left), (target_height, target_width) = framing.crop_top_left, framing.target_size
    sizes = f"{width}×{height}"
    if framing.cut_off < _CUT_A_LITTLE:
        return tag("small", f"{sizes}, whole", class_="crop")
    frame = tag("rect", width=covered_width, height=covered_height, class_="original")
    inside = tag("rect", x=left, y=top, width=target_width, height=target_height, class_="kept")
    drawn = tag(
        "svg",
        frame,
        inside,
        viewBox=f"0 0 {covered_width} {covered_height}",
        class_="frame",
        aria_hidden="true",
    )
    return tag("small", drawn, f"{sizes}, {framing.cut_off:.0%} cut off", class_="crop")


def _advice(told: Told) -> Html:
    if not told.advice:
        return Html()
    sentences = [tag("li", tag("bdi", cut(sentence, _LONGEST_CAPTION))) for sentence in told.advice]
    left = len(sentences) - _MOST_ADVICE
    return tag(
        "div",
        tag("h3", "Advice on the pictures"),
        tag("ul", *sentences[:_MOST_ADVICE]),
        note(f"{left} more are in the log of the training.") if left > 0 else Html(),
        class_="advice",
    )

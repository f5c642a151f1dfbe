"""Pictures laid out in labelled rows, for people who would rather look than read."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12
_INK = (32, 32, 40)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a sheet."""

    title: str
    """Written above the row."""
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()
    """Written under the pictures, one each; none at all is fine too."""


def contact_sheet(rows: Sequence[Row], *, side: int = 256) -> Image.Image:
    """Lay out `rows` of pictures, each scaled to fit `side`×`side` pixels, on white."""
    title_font, caption_font = ImageFont.load_default(size=20), ImageFont.load_default(size=14)
    line = 18
    wrapped = [[textwrap.wrap(caption, side // 7) for caption in row.captions] for row in rows]
    heights = [
        34 + side + line * max((len(lines) for lines in captions), default=0) + _MARGIN
        for captions in wrapped
    ]
    columns = max(len(row.pictures) for row in rows)
    sheet = Image.new("RGB", (columns * (side + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        draw.text((_MARGIN, top), row.title, font=title_font, fill=_INK)
        for column, picture in enumerate(row.pictures):
            left = _MARGIN + column * (side + _MARGIN)
            shown = picture.convert("RGB")
            shown.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left, top + 30))
            for index, text in enumerate(captions[column] if column < len(captions) else []):
                draw.text((left, top + 34 + side + index * line), text, font=caption_font, fill=_INK)
        top += height
    return sheet

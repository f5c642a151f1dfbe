"""Contact sheets: pictures in labelled rows on one page.

Knows pictures, masks and captions; does not know what a sheet is for.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdxl.data.dataset_folder import mask_file

_MARGIN = 12
_MOST_LINES = 8
"""Lines of a caption; a text of a book would make the sheet taller than any picture file can be."""
_INK = (32, 32, 40)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a sheet."""

    title: str
    """Written above the row."""
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()
    """Written under the pictures, one each; empty for none."""


def contact_sheet(rows: Sequence[Row], *, side: int = 256, text: int = 14) -> Image.Image:
    """Lay out `rows` of pictures, each scaled to fit `side`×`side` pixels, on white.

    text: size of the captions' letters in pixels. Titles are larger.
    """
    title_size, line_height = round(text * 10 / 7), round(text * 9 / 7)
    title_font, caption_font = ImageFont.load_default(size=title_size), ImageFont.load_default(size=text)
    wrapped = [[_lines(caption, 2 * side // text) for caption in row.captions] for row in rows]
    heights = [
        title_size + 14 + side + line_height * max((len(lines) for lines in captions), default=0) + _MARGIN
        for captions in wrapped
    ]
    columns = max(len(row.pictures) for row in rows)
    inside = max(
        columns * (side + _MARGIN) - _MARGIN, *(round(title_font.getlength(row.title)) for row in rows)
    )
    sheet = Image.new("RGB", (inside + 2 * _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        draw.text((_MARGIN, top), row.title, font=title_font, fill=_INK)
        for column, picture in enumerate(row.pictures):
            left = _MARGIN + column * (side + _MARGIN)
            under = top + title_size + 14 + side
            shown = picture.convert("RGB")
            shown.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left, top + title_size + 10))
            for index, line in enumerate(captions[column] if column < len(captions) else []):
                draw.text((left, under + index * line_height), line, font=caption_font, fill=_INK)
        top += height
    return sheet


def _lines(caption: str, width: int) -> list[str]:
    """The first lines of a caption, of at most `width` letters each."""
    return textwrap.wrap(caption[: _MOST_LINES * width * 2], width, max_lines=_MOST_LINES, placeholder=" …")


def masked(picture: Image.Image, mask: Image.Image | None) -> Image.Image:
    """Fade `picture` to red where its mask, grey and of its size, is black; without a mask return it unchanged."""
    if mask is None:
        return picture
    faded = Image.blend(picture.convert("RGB"), Image.new("RGB", picture.size, (200, 30, 50)), 0.65)
    return Image.composite(picture.convert("RGB"), faded, mask.convert("L"))


def dataset_sheet(
    folder: Path, captions: Mapping[str, str], *, columns: int = 4, limit: int = 40
) -> Image.Image:
    """The first `limit` pictures of a dataset folder with their masks and captions.

    captions: picture's file name → caption.
    """
    thumbnails = []
    for name in list(captions)[:limit]:
        with Image.open(folder / name) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
        mask = None
        if mask_file(folder / name).is_file():
            with Image.open(mask_file(folder / name)) as opened:
                mask = opened.convert("L").resize(picture.size, Image.Resampling.BOX)
        thumbnails.append((f"{name}: {captions[name]}", masked(picture, mask)))

    title = f"{len(captions)} pictures" if len(captions) > 1 else "1 picture"
    if any(mask_file(folder / name).is_file() for name in captions):
        title += "; red: outside the mask, counts less"
    if len(captions) > limit:
        title = f"The first {limit} of {title}"
    return contact_sheet(
        [
            Row(
                title=title if start == 0 else "",
                pictures=[picture for _, picture in thumbnails[start : start + columns]],
                captions=[caption for caption, _ in thumbnails[start : start + columns]],
            )
            for start in range(0, len(thumbnails), columns)
        ]
    )

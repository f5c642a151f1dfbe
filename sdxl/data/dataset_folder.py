"""The dataset folder, written by preprocessing and read by training: `N.src.png`, `N.mask.png`, `N.large.png`,
`captions.csv`.

The only module that knows these names and the table's columns. Does not know how pictures are prepared or learned.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdxl.data.caption_table import CaptionRow, read_caption_table
from sdxl.data.framing import Framing, Size
from sdxl.errors import DatasetError

TABLE = "captions.csv"
SHEET, ADVICE = "contact_sheet.jpg", "advice.txt"
"""Files for people that lie next to a finished data set; training ignores them."""
FRAMING_COLUMNS = ["original_height", "original_width", "crop_top", "crop_left"]
"""Columns of the table with the size conditioning of each picture, in pixels."""

FramingNumbers = tuple[int, int, int, int]
"""The values of `FRAMING_COLUMNS` for one picture."""

_PICTURE, _MASK, _LARGE = ".src.png", ".mask.png", ".large.png"
_LARGEST = 1_000_000
"""Largest number in the framing columns, in pixels."""


@dataclass(frozen=True, kw_only=True)
class PreparedPicture:
    """One picture of a dataset folder."""

    picture: Path
    """`N.src.png`: RGB, upright, of its final size."""
    mask: Path | None
    """`N.mask.png`: grey, of the picture's size, white where the picture matters. None: all of it matters."""
    large: Path | None
    """`N.large.png`: RGB, what the picture shows with more of the original's pixels. None: there are no more."""
    caption: str
    framing: Framing
    """How the original was resized and cropped to this picture."""


def picture_file(folder: Path, index: int) -> Path:
    """The file of picture number `index`."""
    return folder / f"{index}{_PICTURE}"


def mask_file(picture: Path) -> Path:
    """The file of a picture's mask; pictures without a mask have no such file."""
    return picture.with_name(picture.name.removesuffix(_PICTURE) + _MASK)


def large_file(picture: Path) -> Path:
    """The file of a picture's large copy. Readers that do not know it need only the picture."""
    return picture.with_name(picture.name.removesuffix(_PICTURE) + _LARGE)


def is_large_file(path: Path) -> bool:
    """Whether `path` has the name of a large copy."""
    return path.name.endswith(_LARGE)


def is_picture_file(path: Path) -> bool:
    """Whether `path` has the name of a dataset folder's picture."""
    return path.name.endswith(_PICTURE)


def read_dataset_folder(folder: Path) -> list[PreparedPicture]:
    """The pictures of a dataset folder, in the table's order.

    Raises:
        ContractError: the table is malformed.
        DatasetError: the table lacks the framing columns, or a picture cannot be read.
    """
    table = folder / TABLE
    pictures = []
    for row in read_caption_table(table):
        numbers = _framing_numbers(row)
        if numbers is None:
            raise DatasetError(f"{table} needs the columns {', '.join(FRAMING_COLUMNS)}: prepare it again.")
        original_height, original_width, top, left = numbers
        picture = folder / row.file
        mask, large = mask_file(picture), large_file(picture)
        pictures.append(
            PreparedPicture(
                picture=picture,
                mask=mask if mask.is_file() else None,
                large=large if large.is_file() else None,
                caption=row.caption,
                framing=Framing(
                    original_size=(original_height, original_width),
                    crop_top_left=(top, left),
                    target_size=_size(picture),
                ),
            )
        )
    return pictures


def _size(picture: Path) -> Size:
    """The (height, width) in a picture's header."""
    try:
        with Image.open(picture) as opened:
            return opened.height, opened.width
    except OSError as error:
        raise DatasetError(f"{picture} is missing or damaged: prepare the pictures again.") from error


def earlier_framings(rows: Mapping[Path, CaptionRow]) -> dict[Path, FramingNumbers]:
    """Picture → its framing numbers, for those of `rows` that come from a dataset folder.

    Raises:
        DatasetError: a value is not an integer, or out of range.
    """
    framings = {}
    for picture, row in rows.items():
        numbers = _framing_numbers(row)
        if numbers is not None and is_picture_file(picture):
            framings[picture] = numbers
    return framings


def _framing_numbers(row: CaptionRow) -> FramingNumbers | None:
    """The values of `FRAMING_COLUMNS` in a row; None if it lacks any of these columns."""
    if not row.cells.keys() >= set(FRAMING_COLUMNS):
        return None
    height, width, top, left = (_integer(row.cells[column]) for column in FRAMING_COLUMNS)
    if min(height, width) < 1 or min(top, left) < 0 or max(height, width, top, left) > _LARGEST:
        raise DatasetError(
            f"The row of {row.file} in {row.table} has a wrong number in {', '.join(FRAMING_COLUMNS)}: "
            "delete these columns, or make the file again."
        )
    return height, width, top, left


def _integer(cell: str) -> int:
    """The integer in a cell, which spreadsheets may write as 512.0; -1 for anything else."""
    digits = cell.removesuffix(".0")
    return int(digits) if re.fullmatch(r"[0-9]{1,9}", digits) else -1


def write_captions(table: Path, captions: Mapping[str, str], framings: Sequence[Framing]) -> None:
    """Write the table: picture's file name → caption, with the numbers of each framing in `FRAMING_COLUMNS`."""
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image_file", "caption", *FRAMING_COLUMNS])
        for (name, caption), framing in zip(captions.items(), framings, strict=True):
            writer.writerow([name, caption, *framing.time_ids[:4]])

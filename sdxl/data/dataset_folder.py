"""What lies in a folder of pictures: which files are pictures, masks and captions, and the numbers of a dataset folder.

Knows file names and tables; does not know pixels.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sdxl.data.framing import IMAGE_SUFFIXES, Framing
from sdxl.errors import DatasetError
from sdxl.files.archives import unpack

log = logging.getLogger(__name__)

FRAMING_COLUMNS = ["original_height", "original_width", "crop_top", "crop_left"]
"""Columns of captions.csv that carry the size conditioning of each picture through the seam, in pixels."""
_MASK = ".mask"
SHEET, ADVICE = "contact_sheet.jpg", "advice.txt"
"""What lies in a finished data set for people; not part of what is trained on."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a data set, sorted out."""

    root: Path
    images: list[Path]
    """In natural order: 2.png before 10.png."""
    masks: dict[Path, Path]
    """Image → its mask, for those that bring one."""
    others: list[Path]
    """Captions, and what nobody reads."""


def open_source(source: Path, folder: Path) -> Source:
    """List the files of `source`, a folder, or an archive that is unpacked into `folder`.

    Raises:
        ArchiveError: the archive cannot be unpacked.
        DatasetError: there is no picture in it.
    """
    root = source if source.is_dir() else folder
    found = (
        (path for path in source.rglob("*") if path.is_file()) if source.is_dir() else unpack(source, root)
    )
    files = sorted({path for path in found if not _is_litter(path.relative_to(root))})
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    masks = {path for path in pictures if path.stem.lower().endswith(_MASK)}
    images = sorted(
        (path for path in pictures if path not in masks), key=lambda path: _natural(path.relative_to(root))
    )
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"{source.name} holds no pictures: put {kinds} files into it.")
    others = [path for path in files if path not in set(pictures)]
    ignored = [path.name for path in others if path.suffix.lower() not in (".csv", ".txt")]
    if ignored:
        log.info("Ignored, being neither pictures nor captions: %s", ", ".join(sorted(ignored)[:10]))
    return Source(root=root, images=images, masks=_pair(images, masks, root), others=others)


def _is_litter(path: Path) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") for part in path.parts) or path.name in (
        "Thumbs.db",
        SHEET,
        ADVICE,
    )


def _pair(images: Sequence[Path], masks: set[Path], root: Path) -> dict[Path, Path]:
    """Image → its mask: of a.jpg it is a.mask.png or a.jpg.mask.png, of 0.src.png 0.mask.png; any kind of picture."""
    paired: dict[Path, Path] = {}
    for mask in sorted(masks):
        name = mask.stem[: -len(_MASK)].lower()
        found = [
            image
            for image in images
            if image.parent == mask.parent
            and name in (image.name.lower(), image.stem.lower(), image.stem.lower().removesuffix(".src"))
        ]
        if not found:
            raise DatasetError(
                f"{mask.relative_to(root)} is the mask of no picture: name it after its picture, such as a.mask.png for a.jpg."
            )
        for image in found:
            if image in paired:
                raise DatasetError(f"{image.relative_to(root)} has several masks: keep one.")
            paired[image] = mask
    return paired


def _natural(path: Path) -> list[tuple[int, str]]:
    digits = "".join(character if character.isdigit() else " " for character in path.name).split()
    return [(int(digits[0]) if digits else -1, str(path))]


def read_framings(table: Path) -> dict[str, tuple[int, ...]]:
    """The values of `FRAMING_COLUMNS` of each picture named in a captions.csv; empty for a table without them.

    Raises:
        DatasetError: a cell is no whole number in the range of pictures.
    """
    rows = pd.read_csv(table, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    if not {"image_file", *FRAMING_COLUMNS} <= set(rows.columns):
        return {}
    framings = {}
    for name, *cells in rows[["image_file", *FRAMING_COLUMNS]].itertuples(index=False):
        values = tuple(
            int(cell.strip().removesuffix(".0")) if cell.strip().removesuffix(".0").isdecimal() else -1
            for cell in map(str, cells)
        )
        if min(values) < 0 or min(values[:2]) < 1 or max(values) > 1_000_000:
            raise DatasetError(
                f"The row of {name} in {table.name} has a wrong number in {', '.join(FRAMING_COLUMNS)}: "
                "delete these columns, or make the file again."
            )
        framings[str(name).strip()] = values
    return framings


def write_captions(table: Path, captions: Mapping[str, str], framings: Sequence[Framing]) -> None:
    """Write captions.csv: image file → caption, with the numbers of `FRAMING_COLUMNS`."""
    rows = [
        {
            "image_file": name,
            "caption": caption,
            **dict(zip(FRAMING_COLUMNS, framing.time_ids[:4], strict=True)),
        }
        for (name, caption), framing in zip(captions.items(), framings, strict=True)
    ]
    pd.DataFrame(rows).to_csv(table, index=False)

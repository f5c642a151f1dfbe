"""Which files of a user's folder or archive are pictures, masks and captions.

Knows file names as people choose them; does not know what is in the files.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl.data.dataset_folder import ADVICE, SHEET, is_large_file, is_picture_file
from sdxl.data.mask_names import find_masks
from sdxl.data.picture_reader import IMAGE_SUFFIXES, is_picture_content
from sdxl.errors import DatasetError
from sdxl.files.archives import unpack

log = logging.getLogger(__name__)

CAPTION_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".txt", ".caption"}
"""Suffixes of files that may hold captions."""
ARCHIVE_SUFFIXES = {".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"}
DOCUMENT_SUFFIXES = {
    *(".xlsx", ".xls", ".ods", ".numbers", ".gsheet", ".parquet"),
    *(".docx", ".doc", ".odt", ".pages", ".gdoc", ".rtf"),
    *(".text", ".cap", ".captions", ".tags"),
}
"""Suffixes of files that may hold captions, but are not read."""
_LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", SHEET, ADVICE}
"""Names of files in lower case."""
_LITTER_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
"""Folders of macOS, of Synology's thumbnails, and of deleted files; in lower case."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a data set, sorted by kind."""

    root: Path
    images: list[Path]
    """The pictures in natural order: 2.png before 10.png."""
    masks: dict[Path, Path]
    """Picture → its mask, for pictures with a mask."""
    others: list[Path]
    """All other files: captions, and files that are ignored."""

    def relative(self, path: Path) -> str:
        """The path of a file in the data set, for messages."""
        return str(path.relative_to(self.root))


def open_source(source: Path, folder: Path) -> Source:
    """List the files of `source`: a folder, or an archive to unpack into `folder`.

    Raises:
        ArchiveError: the archive cannot be unpacked.
        DatasetError: no picture, or a mask without its picture.
    """
    root = source if source.is_dir() else folder
    if source.is_dir():
        found = [path for path in source.rglob("*") if path.is_file()]
    else:
        found = unpack(source, root)
    files = sorted({path for path in found if not _is_litter(path.relative_to(root))})
    prepared = {path.parent for path in files if is_picture_file(path)}
    # The large copies of a dataset folder belong to its pictures, like masks.
    files = [path for path in files if not (is_large_file(path) and path.parent in prepared)]

    pictures = [path for path in files if _is_picture(path)]
    masks = find_masks(pictures, root)
    images = sorted(set(pictures) - set(masks.values()), key=lambda path: _natural(path.relative_to(root)))
    others = sorted(set(files) - set(pictures))
    if not images:
        raise DatasetError(_no_pictures(source, others))

    ignored = [
        path.name for path in others if path.suffix.lower() not in CAPTION_SUFFIXES | DOCUMENT_SUFFIXES
    ]
    if ignored:
        names = ", ".join(sorted(ignored)[:10]) + (", …" if len(ignored) > 10 else "")
        log.warning("Ignored files that are neither pictures nor captions (%d): %s", len(ignored), names)
    if masks:
        log.info("Masks come with %d of %d pictures", len(masks), len(images))
    return Source(root=root, images=images, masks=masks, others=others)


def _no_pictures(source: Path, others: Sequence[Path]) -> str:
    """The error for a data set without pictures."""
    archives = [path.name for path in others if path.suffix.lower() in ARCHIVE_SUFFIXES]
    if archives:
        return (
            f"{source.name} holds no pictures but another archive, {archives[0]}: unpack that one and pack its "
            "pictures directly."
        )
    return f"{source.name} holds no pictures: put {', '.join(sorted(IMAGE_SUFFIXES))} files into it."


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture by its suffix, or by its content if it has an unknown suffix or none."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    return suffix not in CAPTION_SUFFIXES | ARCHIVE_SUFFIXES and is_picture_content(path)


def _is_litter(path: Path) -> bool:
    """Whether an operating system or an earlier run of the preprocessor put this file there."""
    hidden = any(part.lower() in _LITTER_FOLDERS or part.startswith(".") for part in path.parts)
    return hidden or path.name.lower() in _LITTER or path.name.startswith("~$")  # a lock of Microsoft Office


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts by the first number in a file's name, then by its path; names without a number come first."""
    digits = "".join(character if character.isdecimal() else " " for character in path.name).split()
    return [(int(digits[0]) if digits else -1, str(path))]

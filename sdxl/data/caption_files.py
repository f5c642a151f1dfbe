"""Captions that come with the pictures: a table, or a text file for each picture.

Knows the layouts of captions in an archive; does not know models that write captions. To read another layout, add a
function to `find_captions`.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset_and_utils import ContractError
from sdxl.data.caption_table import (
    CaptionRow,
    caption_in_json,
    files_in_json,
    has_caption_columns,
    read_caption_table,
    read_text,
)
from sdxl.data.caption_text import check_caption_text, one_line
from sdxl.data.picture_names import PictureNames
from sdxl.data.source_folder import CAPTION_SUFFIXES, DOCUMENT_SUFFIXES, Source
from sdxl.errors import DatasetError, some_of

log = logging.getLogger(__name__)

_TEXTS = {".txt", ".caption"}
_TABLES = CAPTION_SUFFIXES - _TEXTS
_TABLE_NAMES = ("caption", "metadata", "meta_cap")
"""A file whose name contains one of these and whose suffix is in `_TABLES` is meant as a table of captions."""
_NO_CAPTIONS = {"readme", "license", "licence", "copying", "notice", "changelog", "credits", "requirements"}
"""Stems of text files that come with archives and hold no captions."""


@dataclass(frozen=True, kw_only=True)
class GivenCaptions:
    """The captions that a user gave, one for each picture."""

    texts: Mapping[Path, str]
    """Picture → caption."""
    source: Mapping[Path, str]
    """Picture → where its caption comes from, for messages: "the caption of 1.jpg", "global_caption"."""
    rows: Mapping[Path, CaptionRow] = field(default_factory=dict)
    """Picture → its row, if the captions come from a table."""


def find_captions(files: Source, *, global_caption: str | None) -> GivenCaptions | None:
    """The captions of all pictures, or None if there are none.

    The first of these that exists is used: a table with "caption" or "metadata" in its name, or any csv, tsv, jsonl or
    json with the right columns; a text file for each picture (.txt or .caption, or else .json); `global_caption`.

    Raises:
        ContractError: a table is malformed, or a file is not UTF-8 text.
        DatasetError: a picture without caption, a row without picture, several tables or several captions of one picture,
            an empty text file, or files that look like captions but cannot be assigned to pictures.
        UserInputError: a caption with a placeholder token such as <s0>.
    """
    names = PictureNames(files.images, files.root)
    tables = _tables(files, names)
    read = set(tables)
    if tables:
        captions, origin = _from_tables(files, names, tables), " and ".join(map(files.relative, tables))
    else:
        texts = _texts_of(files, names, _TEXTS) or _json_of(files, names)
        captions, origin = _from_texts(files, texts), "the files named after the pictures"
        read |= {path for paths in texts.values() for path in paths}
    ignored = [path for path in files.others if path not in read and _is_text(path)]
    unread = [path for path in ignored if _looks_like_captions(path, names)]

    if captions is not None:
        if global_caption and set(captions.texts.values()) != {global_caption}:
            log.warning("global_caption is not used, because the pictures have captions.")
    elif global_caption:
        captions, origin = _same_for_all(files, global_caption), "global_caption"
    elif unread:
        raise DatasetError(
            f"{some_of(files.relative(path) for path in unread)} may hold captions, but not in a way that is read: name "
            "text files after their pictures (1.txt for 1.jpg), list image_file and caption in a captions.csv, or delete "
            f"{'it' if len(unread) == 1 else 'them'}."
        )
    if captions is not None:
        log.info("Captions come from %s", origin)
    if ignored:
        log.warning("Ignored %s", some_of(files.relative(path) for path in ignored))
    return captions


# Tables -----------------------------------------------------------------------------------------------------


def _tables(files: Source, names: PictureNames) -> list[Path]:
    """The tables of captions: those that are meant as such by their names, or else those with the right columns.

    Several tables are fine in several folders, such as one for each subject.
    """
    candidates = [path for path in files.others if path.suffix.lower() in _TABLES and not names.beside(path)]
    meant = [path for path in candidates if _is_called_a_table(path)]
    # Tools write metadata.json with something else than captions.
    meant = [path for path in meant if path.suffix.lower() != ".json" or _named_in_json(path, names)]
    tables = meant or [path for path in candidates if _is_table(path, files, names)]
    if len({path.parent for path in tables}) < len(tables):
        listed = ", ".join(sorted(files.relative(path) for path in tables))
        raise DatasetError(f"There are several captions files ({listed}): keep one.")
    return tables


def _is_called_a_table(path: Path) -> bool:
    return any(part in path.name.lower() for part in _TABLE_NAMES)


def _is_table(path: Path, files: Source, names: PictureNames) -> bool:
    """Whether a file of any name is a table of captions: it has the right columns, or is json that names all pictures."""
    if path.suffix.lower() != ".json":
        return has_caption_columns(path)
    return _named_in_any_json(path, names) >= set(files.images)


def _named_in_any_json(path: Path, names: PictureNames) -> set[Path]:
    """Like `_named_in_json`; empty if the file is not JSON."""
    with contextlib.suppress(ContractError):
        return _named_in_json(path, names)
    return set()


def _named_in_json(path: Path, names: PictureNames) -> set[Path]:
    """The pictures for which a json file has captions, if it is a table of captions.

    Raises:
        ContractError: not JSON.
    """
    return {image for file in files_in_json(path) for image in names.named(file, path.parent)}


def _from_tables(files: Source, names: PictureNames, tables: Sequence[Path]) -> GivenCaptions:
    """Captions from tables: each row names a picture."""
    texts: dict[Path, str] = {}
    rows: dict[Path, CaptionRow] = {}
    for table in tables:
        for row in read_caption_table(table):
            image = _picture_of_row(row.file, files, names, table)
            if image in texts:
                raise DatasetError(f"{table.name} has two rows for {files.relative(image)}: keep one.")
            texts[image], rows[image] = one_line(row.caption), row
    missing = [files.relative(image) for image in files.images if image not in texts]
    if missing:
        listed = " and ".join(table.name for table in tables)
        raise DatasetError(
            f"{listed} has no row for {some_of(missing)}: add a row for each picture, or remove the pictures."
        )
    return _given(files, texts, rows)


def _picture_of_row(name: str, files: Source, names: PictureNames, table: Path) -> Path:
    """The picture that a row names."""
    found = names.named(name, table.parent)
    if len(found) == 1:
        return found[0]
    if found:
        raise DatasetError(
            f"{table.name} names {name}, but there are several of that name: write the folder too."
        )
    if PictureNames(files.others, files.root).named(name, table.parent):
        raise DatasetError(
            f"{table.name} names {name}, which is there, but this kind of file is not read: save it as jpg or png, or "
            "delete the row."
        )
    raise DatasetError(
        f"{table.name} names {name}, but there is no such picture: add the picture or delete the row."
    )


# One file for each picture ----------------------------------------------------------------------------------


def _texts_of(files: Source, names: PictureNames, suffixes: set[str]) -> dict[Path, list[Path]]:
    """Picture → the files with one of `suffixes` that are named after it."""
    texts: dict[Path, list[Path]] = defaultdict(list)
    for path in files.others:
        if path.suffix.lower() in suffixes:
            for image in names.beside(path):
                texts[image].append(path)
    return texts


def _json_of(files: Source, names: PictureNames) -> dict[Path, list[Path]]:
    """Picture → the json files that are named after it, if any of these has a caption."""
    texts = _texts_of(files, names, {".json"})
    return texts if any(caption_in_json(path) for paths in texts.values() for path in paths) else {}


def _from_texts(files: Source, texts: Mapping[Path, Sequence[Path]]) -> GivenCaptions | None:
    """Captions from files that are named after their pictures; None if there are no such files."""
    if not texts:
        return None
    suffix = next(iter(texts.values()))[0].suffix.lower()
    captions: dict[Path, str] = {}
    several: dict[str, None] = {}
    for image in files.images:
        found: dict[str, Path] = {}
        for path in texts.get(image, ()):
            text = _text_of(path, files)
            found[one_line(text)] = path
            if len([line for line in text.splitlines() if line.strip()]) > 1:
                several[files.relative(path)] = None
        if not found:
            name = Path(files.relative(image))
            raise DatasetError(
                f"{name} has no {suffix}, but other pictures have: add {name.with_suffix(suffix)}."
            )
        if len(found) > 1:
            listed = " and ".join(files.relative(path) for path in found.values())
            raise DatasetError(f"{files.relative(image)} has several captions, in {listed}: keep one.")
        captions[image] = next(iter(found))
    if several:
        log.warning("The lines of %s are joined to one caption.", some_of(several))
    return _given(files, captions)


def _text_of(path: Path, files: Source) -> str:
    """The caption in a text or json file, as written."""
    text = caption_in_json(path) if path.suffix.lower() == ".json" else read_text(path)
    if not text or not one_line(text):
        raise DatasetError(f"{files.relative(path)} is empty: write the caption of its picture into it.")
    return text


# All layouts ------------------------------------------------------------------------------------------------


def _given(
    files: Source, texts: Mapping[Path, str], rows: Mapping[Path, CaptionRow] | None = None
) -> GivenCaptions:
    """The captions in the order of the pictures."""
    source = {image: f"The caption of {files.relative(image)}" for image in files.images}
    for image, text in texts.items():
        check_caption_text(text, source[image])
    return GivenCaptions(
        texts={image: texts[image] for image in files.images},
        source=source,
        rows=rows or {},
    )


def _same_for_all(files: Source, caption: str) -> GivenCaptions:
    return GivenCaptions(
        texts=dict.fromkeys(files.images, caption), source=dict.fromkeys(files.images, "global_caption")
    )


def _is_text(path: Path) -> bool:
    """Whether a file has content, and a suffix of files with text."""
    return path.suffix.lower() in CAPTION_SUFFIXES | DOCUMENT_SUFFIXES and path.stat().st_size > 0


def _looks_like_captions(path: Path, names: PictureNames) -> bool:
    """Whether a text that was not read may hold captions."""
    suffix, stem = path.suffix.lower(), path.stem.lower()
    if stem.split(".")[0] in _NO_CAPTIONS:
        return False
    if suffix == ".json":  # settings of tools are json files too
        return _is_called_a_table(path) or bool(names.beside(path) or _named_in_any_json(path, names))
    return True

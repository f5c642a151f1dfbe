"""Read a table of captions: csv, tsv, jsonl or json.

Knows the formats and the names of their columns; does not know which pictures exist.
"""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_and_utils import ContractError
from sdxl.data.caption_text import one_line

FILE_COLUMNS = ("image_file", "image_path", "file_name", "filename")
"""Names of the column with the picture's file; the first one present is used."""
CAPTION_COLUMNS = ("caption", "text")
"""Names of the column with the caption; the first one present is used."""
MAX_BYTES = 64 << 20
"""Largest text file that is read."""

_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """One row of a table: a picture and its caption, both filled."""

    file: str
    """The picture's file as written."""
    caption: str
    table: str
    """The table's file name, for messages."""
    cells: Mapping[str, str]
    """All columns, named in lower case → cell. Cells have no surrounding spaces."""


def read_caption_table(path: Path) -> list[CaptionRow]:
    """Read a table with a column of `FILE_COLUMNS` and a column of `CAPTION_COLUMNS`, in any case.

    - csv, tsv: cells are separated by commas, semicolons or tabs, whichever the header uses.
    - jsonl: one object in each line.
    - json: a list of objects, or one object that maps files to captions or to objects with a caption.

    Empty rows are skipped, and so are empty cells after the last column.

    Raises:
        ContractError: unreadable, a missing or repeated column, a row with more cells than columns, an empty cell, or a
            picture with two rows.
    """
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        rows = _from_json_lines(text, path.name)
    elif path.suffix.lower() == ".json":
        rows = _from_json(text, path.name)
    else:
        rows = _from_csv(text, path.name)

    found: dict[str, CaptionRow] = {}
    for place, cells in rows:
        file, caption = (_first(cells, names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
        if not file or not one_line(caption):
            raise ContractError(f"{place} of {path.name} has no image file or no caption: fill in both.")
        if file in found:
            raise ContractError(f"{place} of {path.name} names {file} again: keep one row for each picture.")
        found[file] = CaptionRow(file=file, caption=caption, table=path.name, cells=cells)
    return list(found.values())


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, or in UTF-16 with its byte order mark.

    Raises:
        ContractError: in another encoding, rich text, or larger than `MAX_BYTES`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ContractError(f"{path} cannot be read: give an existing file.") from error
    if len(content) > MAX_BYTES:
        raise ContractError(
            f"{path.name} has more than {MAX_BYTES >> 20} MiB: give a smaller file of captions."
        )
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding).lstrip("\ufeff")  # some programs write the mark twice
    except UnicodeDecodeError as error:
        raise ContractError(f"{path.name} is not UTF-8 text: save it as UTF-8.") from error
    if "\0" in text:
        raise ContractError(f"{path.name} is not UTF-8 text: save it as UTF-8.")
    if text.startswith("{\\rtf"):
        raise ContractError(f"{path.name} is rich text with formatting: save it as plain text.")
    return text


def caption_in_json(path: Path) -> str | None:
    """The caption in a json file that belongs to one picture: a string, or an object with a caption. None if it has none.

    Raises:
        ContractError: not JSON.
    """
    content = _parse(read_text(path), path.name, "")
    if isinstance(content, dict):
        content = _first(_cells(content), CAPTION_COLUMNS)
    return content.strip() or None if isinstance(content, str) else None


def files_in_json(path: Path) -> list[str]:
    """The files for which a table in json has captions; empty if it is no such table.

    Raises:
        ContractError: not JSON.
    """
    rows = [cells for _, cells in _from_json(read_text(path), path.name)]
    return [_first(cells, FILE_COLUMNS) for cells in rows if _complete(cells)]


def has_caption_columns(path: Path) -> bool:
    """Whether a csv, tsv or jsonl file looks like a table of captions: it names both columns."""
    try:
        text = read_text(path)
        if path.suffix.lower() == ".jsonl":
            _, columns = next(_from_json_lines(text, path.name), ("", {}))
        else:
            columns, _ = _header(text, path.name)
    except ContractError:
        return False
    return _complete(columns)


# csv --------------------------------------------------------------------------------------------------------


def _from_csv(text: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The place of each row, such as "Line 5", and its cells."""
    columns, delimiter = _header(text, name)
    if not columns:
        raise ContractError(f"{name} cannot be read as a table, because it is empty: fill it, or delete it.")
    if not _complete(columns):
        raise ContractError(
            f"{name} needs the columns image_file and caption in its first line, but has {', '.join(columns)}."
        )
    for column in columns:
        if column and columns.count(column) > 1:
            raise ContractError(f"{name} has the column {column} twice: keep one.")
    records = _records(text, name, delimiter)
    next(records)
    for line, cells in records:
        if len(cells) > len(columns):
            raise ContractError(
                f'Line {line} of {name} has {len(cells)} cells for {len(columns)} columns: put the caption in straight quotes (").'
            )
        yield f"Line {line}", dict(itertools.zip_longest(columns, cells, fillvalue=""))


def _header(text: str, name: str) -> tuple[list[str], str]:
    """The columns in lower case, and the delimiter. The first delimiter whose columns are complete wins, else the comma."""

    def columns(delimiter: str) -> list[str]:
        _, cells = next(_records(text, name, delimiter), (1, []))
        return [one_line(cell).lower() for cell in cells]

    for delimiter in _DELIMITERS:
        with contextlib.suppress(ContractError):  # a header in quotes is no csv with any other delimiter
            if _complete(found := columns(delimiter)):
                return found, delimiter
    return columns(_DELIMITERS[0]), _DELIMITERS[0]


def _records(text: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line of the file in which each record begins, counted from 1, and its cells without empty ones at the end.

    Skips records without content, and the line "sep=;" with which Excel names the delimiter.
    """
    text = re.sub(r"\A\s*sep=.(?=[\r\n])", "", text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    while True:
        line = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise ContractError(
                f"Line {line} of {name} is not csv ({error}): close the quotes, and write a quotation mark inside "
                "quotes twice."
            ) from error
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            yield line, cells


# JSON -------------------------------------------------------------------------------------------------------


def _from_json_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"Line {number}", _cells(_parse(line, name, f"Line {number} of "))


def _from_json(text: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    content = _parse(text, name, "")
    if isinstance(content, dict):
        content = [
            _cells(value) | {"image_file": file}
            if isinstance(value, dict)
            else {"image_file": file, "caption": value}
            for file, value in content.items()
        ]
    for number, value in enumerate(content if isinstance(content, list) else [], 1):
        yield f"Entry {number}", _cells(value)


def _parse(text: str, name: str, place: str) -> Any:
    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in pairs:
            if key in entries:
                raise ContractError(f"{place}{name} names {key} twice: keep one.")
            entries[key] = value
        return entries

    try:
        return json.loads(text, object_pairs_hook=without_repetition)
    except ContractError:
        raise
    except (ValueError, RecursionError) as error:
        raise ContractError(f"{place}{name} cannot be read as JSON: correct it or write it again.") from error


def _cells(value: Any) -> dict[str, str]:
    """The entries of an object that are texts or numbers, as text."""
    if not isinstance(value, dict):
        return {}
    return {
        key.strip().lower(): str(cell).strip()
        for key, cell in value.items()
        if isinstance(cell, str | int | float) and not isinstance(cell, bool)
    }


def _complete(columns: Mapping[str, str] | list[str]) -> bool:
    """Whether there is a column for the file and one for the caption."""
    return all(any(name in columns for name in names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))


def _first(cells: Mapping[str, str], names: tuple[str, ...]) -> str:
    """The cell of the first of `names` that is a column; empty if none is."""
    return next((cells[name] for name in names if name in cells), "")

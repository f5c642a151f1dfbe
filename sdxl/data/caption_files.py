"""Captions that come with the pictures: a csv, or a text file next to each picture.

Knows the layouts of captions in an archive; does not know models that write captions. To read another layout, add a
function to `find_captions`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataset_and_utils import TokenMap, read_captions_csv
from sdxl.data.source_folder import Source
from sdxl.errors import DatasetError

log = logging.getLogger(__name__)


def find_captions(files: Source, *, global_caption: str | None) -> dict[Path, str] | None:
    """Picture → its caption, or None if there are no captions.

    The first of these that exists is used: a csv with "caption" in its name; a `.txt` next to each picture;
    `global_caption` for all pictures.

    Raises:
        ContractError: the csv is malformed.
        DatasetError: a picture without caption, a row without picture, several csv files, or an empty `.txt`.
    """
    tables = caption_tables(files)
    texts = {path.with_suffix(""): path for path in files.others if path.suffix.lower() == ".txt"}
    if len(tables) > 1:
        names = ", ".join(sorted(str(path.relative_to(files.root)) for path in tables))
        raise DatasetError(f"There are several captions files ({names}): keep one.")
    if tables:
        captions, origin = _from_table(files, tables[0]), tables[0].name
    elif any(image.with_suffix("") in texts for image in files.images):
        captions, origin = _from_texts(files, texts), "the .txt files"
    elif global_caption:
        captions, origin = dict.fromkeys(files.images, global_caption), "global_caption"
    else:
        captions, origin = None, ""

    unread = [path.name for path in files.others if path.suffix.lower() == ".csv"]
    if unread and not tables:
        log.warning("Ignored %s: to use its captions, name it captions.csv.", ", ".join(unread))
    if captions is not None:
        log.info("Captions come from %s", origin)
    return captions


def caption_tables(files: Source) -> list[Path]:
    """The csv files that hold captions, judged by their names."""
    return [path for path in files.others if path.suffix.lower() == ".csv" and "caption" in path.name.lower()]


def require_token(captions: Mapping[Path, str], token_map: TokenMap, root: Path) -> None:
    """Refuse captions without a token of the map: their pictures would teach the token nothing.

    Raises:
        DatasetError: names the first such picture.
    """
    for image, caption in captions.items():
        if not token_map.named_in(caption):
            tokens = " or ".join(token_map.placeholders)
            raise DatasetError(
                f'The caption of {image.relative_to(root)}, "{caption}", names no token of token_map: '
                f"add {tokens} as a separate word, in exactly this spelling."
            )


def _from_table(files: Source, table: Path) -> dict[Path, str]:
    """Captions from a csv: each row names a picture by its path or by its file name."""
    captions: dict[Path, str] = {}
    for name, caption in read_captions_csv(table).items():
        image = _find(name, files, table)
        if image in captions:
            raise DatasetError(f"{table.name} has two rows for {image.relative_to(files.root)}: keep one.")
        captions[image] = caption
    missing = [str(image.relative_to(files.root)) for image in files.images if image not in captions]
    if missing:
        raise DatasetError(
            f"{table.name} has no row for {_some(missing)}: add a row for each picture, or remove the pictures."
        )
    return {image: captions[image] for image in files.images}


def _find(name: str, files: Source, table: Path) -> Path:
    """The picture that a row names: by its path in the archive, its path from the table, or its file name."""
    wanted = Path(name.replace("\\", "/"))
    found = [image for image in files.images if image.relative_to(files.root) == wanted]
    found = found or [image for image in files.images if image == table.parent / wanted]
    found = found or [image for image in files.images if image.name == wanted.name]
    if not found:
        raise DatasetError(
            f"{table.name} names {name}, but there is no such picture: add the picture or delete the row."
        )
    if len(found) > 1:
        raise DatasetError(
            f"{table.name} names {name}, but there are several of that name: write the folder too."
        )
    return found[0]


def _from_texts(files: Source, texts: Mapping[Path, Path]) -> dict[Path, str]:
    """Captions from text files: the caption of a.jpg is in a.txt, in the same folder."""
    captions: dict[Path, str] = {}
    for image in files.images:
        text = texts.get(image.with_suffix(""))
        if text is None:
            name = image.relative_to(files.root)
            raise DatasetError(
                f"{name} has no .txt, but other pictures have: add {name.with_suffix('.txt')}."
            )
        name = text.relative_to(files.root)
        try:
            captions[image] = " ".join(text.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise DatasetError(f"{name} is not UTF-8 text: save it as UTF-8.") from error
        if not captions[image]:
            raise DatasetError(f"{name} is empty: write the caption of {image.name} into it.")
    return captions


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

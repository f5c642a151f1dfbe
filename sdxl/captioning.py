"""Which caption belongs to which picture.

Knows file names and texts; does not know pixels.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from dataset_and_utils import TokenMap, read_captions_csv
from sdxl.errors import DatasetError

log = logging.getLogger(__name__)


def find_captions(
    images: Sequence[Path],
    others: Sequence[Path],
    root: Path,
    *,
    global_caption: str | None,
    caption_prefix: str,
) -> dict[Path, str]:
    """Return the caption of every image.

    Taken from, in this order: a csv whose name holds "caption"; one `.txt` beside each image; `global_caption` for
    all; `caption_prefix` for all.

    Raises:
        DatasetError: an image without caption, a row without image, several csv files, or an empty `.txt`.
    """
    tables = [path for path in others if path.suffix.lower() == ".csv" and "caption" in path.name.lower()]
    texts = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
    if len(tables) > 1:
        names = ", ".join(sorted(str(path.relative_to(root)) for path in tables))
        raise DatasetError(f"There are several captions files ({names}): keep one.")
    if tables:
        captions, origin = _from_table(images, tables[0], root), tables[0].name
    elif any(image.with_suffix("") in texts for image in images):
        captions, origin = _from_texts(images, texts, root), "the .txt files"
    elif global_caption:
        captions, origin = dict.fromkeys(images, global_caption), "global_caption"
    else:
        captions, origin = dict.fromkeys(images, caption_prefix.strip(" ,")), "caption_prefix"
    log.info("Captions come from %s", origin)
    return captions


def require_token(captions: dict[Path, str], token_map: TokenMap, root: Path) -> None:
    """Refuse captions that name no token of the map: such a picture teaches the token nothing.

    Raises:
        DatasetError: names the first such picture.
    """
    for image, caption in captions.items():
        if not token_map.named_in(caption):
            tokens = " or ".join(token_map.placeholders)
            raise DatasetError(
                f'The caption of {image.relative_to(root)}, "{caption}", names no token of token_map: '
                f"write {tokens} into it, as a word of its own and in this case."
            )


def _from_table(images: Sequence[Path], table: Path, root: Path) -> dict[Path, str]:
    rows = read_captions_csv(table)
    captions: dict[Path, str] = {}
    for name, caption in rows.items():
        image = _match(name, images, table, root)
        if image in captions:
            raise DatasetError(f"{table.name} has two rows for {image.relative_to(root)}: keep one.")
        captions[image] = caption
    missing = [str(image.relative_to(root)) for image in images if image not in captions]
    if missing:
        raise DatasetError(
            f"{table.name} has no row for {_some(missing)}: add one each, or take the pictures out."
        )
    return {image: captions[image] for image in images}


def _match(name: str, images: Sequence[Path], table: Path, root: Path) -> Path:
    """The image that a row names: by its path in the archive, else by its file name alone."""
    wanted = Path(name.replace("\\", "/"))
    found = [image for image in images if image.relative_to(root) == wanted]
    found = found or [image for image in images if image == table.parent / wanted]
    found = found or [image for image in images if image.name == wanted.name]
    if not found:
        raise DatasetError(
            f"{table.name} names {name}, which is not among the pictures: add it or delete its row."
        )
    if len(found) > 1:
        raise DatasetError(
            f"{table.name} names {name}, but there are several of that name: write the folder too."
        )
    return found[0]


def _from_texts(images: Sequence[Path], texts: dict[Path, Path], root: Path) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for image in images:
        text = texts.get(image.with_suffix(""))
        if text is None:
            name = image.relative_to(root)
            raise DatasetError(
                f"{name} has no .txt beside it while others have: add {name.with_suffix('.txt')}."
            )
        try:
            captions[image] = " ".join(text.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise DatasetError(f"{text.relative_to(root)} is no UTF-8 text: save it as UTF-8.") from error
        if not captions[image]:
            raise DatasetError(
                f"{text.relative_to(root)} is empty: write the caption of {image.name} into it."
            )
    return captions


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

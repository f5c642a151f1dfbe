"""Which caption belongs to which picture: the one that comes with it, or one that a model writes.

Knows file names, texts and whole pictures; does not know crops.
"""

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from dataset_and_utils import TokenMap, read_captions_csv
from sdxl.data.helper_models import loaded, part_of
from sdxl.errors import DatasetError, UserInputError, WeightsError
from sdxl.files.hub import CAPTIONER

log = logging.getLogger(__name__)


def find_captions(
    images: Sequence[Path],
    others: Sequence[Path],
    root: Path,
    *,
    global_caption: str | None,
) -> dict[Path, str] | None:
    """Return the given caption of every image, or None where none is given.

    Taken from, in this order: a csv whose name holds "caption"; one `.txt` beside each image; `global_caption` for
    all.

    Raises:
        DatasetError: an image without caption, a row without image, several csv files, or an empty `.txt`.
    """
    tables = caption_tables(others)
    texts = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
    if len(tables) > 1:
        names = ", ".join(sorted(str(path.relative_to(root)) for path in tables))
        raise DatasetError(f"There are several captions files ({names}): keep one.")
    if tables:
        captions: dict[Path, str] | None = _from_table(images, tables[0], root)
        origin = tables[0].name
    elif any(image.with_suffix("") in texts for image in images):
        captions, origin = _from_texts(images, texts, root), "the .txt files"
    elif global_caption:
        captions, origin = dict.fromkeys(images, global_caption), "global_caption"
    else:
        captions, origin = None, ""
    unread = [path.name for path in others if path.suffix.lower() == ".csv" and path not in tables]
    if unread and not tables:
        log.warning("%s is not read: captions are looked for in a csv named captions.csv.", ", ".join(unread))
    if captions is None:
        return None
    log.info("Captions come from %s", origin)
    return captions


def caption_tables(others: Sequence[Path]) -> list[Path]:
    """The csv files that hold captions, by their names."""
    return [path for path in others if path.suffix.lower() == ".csv" and "caption" in path.name.lower()]


class Captioner:
    """A loaded image-to-text model, such as BLIP (arXiv:2201.12086)."""

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    def caption(self, image: Image.Image, prefix: str) -> str:
        """A caption that begins with `prefix`, letter by letter, and goes on as the model sees the picture.

        Words of the prefix that are written in capitals, the tokens, appear in it but once. The model searches with
        three beams and draws nothing at random.
        """
        device = next(self.model.parameters()).device
        inputs = self.processor(images=image.convert("RGB"), text=prefix, return_tensors="pt").to(device)
        ids = self.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=40)
        whole = self.processor.batch_decode(ids, skip_special_tokens=True)[0]
        return join_caption(prefix, whole)


@contextmanager
def captioner() -> Iterator[Captioner]:
    """The captioner for as long as the block lasts.

    Raises:
        DownloadError, WeightsError: the model cannot be had.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = part_of(CAPTIONER, AutoProcessor.from_pretrained, backend="pil")
    if getattr(processor, "chat_template", None):
        raise WeightsError(
            f"{CAPTIONER.purpose} wants instructions instead of the beginning of a caption: name a model such as BLIP in "
            f"{CAPTIONER.setting}."
        )
    with loaded(CAPTIONER, AutoModelForImageTextToText) as model:
        yield Captioner(model, processor)


def join_caption(prefix: str, written: str) -> str:
    """`prefix` and what a model wrote after it; `written` may repeat the prefix, in whatever case and spacing."""
    prefix, at = prefix.strip(), 0
    for letter in filter(str.isalnum, prefix):
        while at < len(written) and not written[at].isalnum():
            at += 1
        if at == len(written) or _plain(written[at]) != _plain(letter):
            at = 0
            break
        at += 1
    rest = written[at:]
    for token in (*tokens_in(prefix), *_names_in(prefix)):
        rest = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", rest, flags=re.IGNORECASE)
    rest = " ".join(rest.split()).strip(" ,.")
    if not rest:
        return prefix.strip(" ,")
    return f"{prefix} {rest}"


def _plain(letter: str) -> str:
    """A letter without its case and accent, which models drop."""
    return unicodedata.normalize("NFKD", letter.lower())[0]


def _names_in(text: str) -> list[str]:
    """The words of `text` that begin with a capital, after its first word."""
    return re.findall(r"(?<=\s)[A-Z]\w*", text)


def tokens_in(text: str) -> list[str]:
    """The words of `text` that look like new tokens: two or more letters and underscores, all in capitals."""
    return list(dict.fromkeys(re.findall(r"(?<!\w)[A-Z_]*[A-Z][A-Z_]+(?!\w)", text)))


def names_in(text: str, token: str) -> int:
    """How often `text` names `token`, as a word of its own."""
    return len(re.findall(rf"(?<!\w){re.escape(token)}(?!\w)", text))


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


def check_caption_text(text: str) -> None:
    """Refuse placeholders in the beginning of captions.

    Raises:
        UserInputError: `text` holds something like <s0>.
    """
    placeholder = re.search(r"<s[0-9]+>", text)
    if placeholder is not None:
        raise UserInputError(
            f'"{text}" holds {placeholder[0]}, which the text encoders have not learned before training, and token_map '
            "puts it in by itself: write a word such as TOK instead."
        )

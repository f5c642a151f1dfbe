"""From an archive or folder of pictures to a dataset folder: `N.src.png`, `N.mask.png`, `captions.csv`.

The dataset folder is a seam: look at it, edit captions.csv, zip it, train on it. This file knows pictures and captions;
it does not know training.

    python preprocess.py -i files=@raw.zip -i caption_text="a photo of TOK" -i target_size=512 -o out/
"""

import logging
import pathlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from typing import Optional

import pandas as pd
from cog import BaseRunner, Input, Path
from tqdm import tqdm

from dataset_and_utils import TokenMap
from sdxl.archives import pack_tar, unpack
from sdxl.captioning import find_captions, require_token
from sdxl.command_line import run_command_line
from sdxl.config import new_workspace
from sdxl.errors import DatasetError, UserInputError
from sdxl.fetching import fetch
from sdxl.framing import IMAGE_SUFFIXES, read_image, square

log = logging.getLogger(__name__)

FRAMING_COLUMNS = ["original_height", "original_width", "crop_top", "crop_left"]
"""Columns of captions.csv that carry the size conditioning of each picture through the seam, in pixels."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings of the preprocessing stage."""

    target_size: int
    """Side of the square pictures that come out, in pixels; a multiple of 8."""
    global_caption: str | None = None
    """Caption of all pictures, where the archive brings none."""
    caption_prefix: str = "a photo of TOK, "
    """Caption of all pictures, where there is neither a caption in the archive nor a global one."""
    token_map: TokenMap | None = None
    """When given, every caption must name one of its tokens."""

    def __post_init__(self) -> None:
        if self.target_size < 64 or self.target_size > 2048 or self.target_size % 8:
            raise UserInputError(
                f"A picture size of {self.target_size} does not work: give a multiple of 8 from 64 to 2048, such as 1024."
            )


def prepare_dataset(source: pathlib.Path, folder: pathlib.Path, *, config: PreprocessConfig) -> pathlib.Path:
    """Fill `folder` with the training set made of `source`, a zip, a tar or a folder of pictures; return `folder`.

    A picture that is a dataset folder's already (`N.src.png` beside `N.mask.png`) keeps its mask.

    Raises:
        ArchiveError, DatasetError, ContractError: see there; nothing of a failed run is read by later stages.
    """
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=folder.parent) as unpacked:
        root = source if source.is_dir() else pathlib.Path(unpacked)
        files = (
            sorted(path for path in root.rglob("*") if path.is_file())
            if source.is_dir()
            else unpack(source, root)
        )
        images, masks, others = _sort_files(files, source, root)
        captions = find_captions(
            images, others, root, global_caption=config.global_caption, caption_prefix=config.caption_prefix
        )
        if config.token_map is not None:
            require_token(captions, config.token_map, root)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, (image, caption) in enumerate(
            tqdm(captions.items(), desc="Preparing pictures", unit="picture")
        ):
            framing = _frame(image, masks.get(image), folder / str(index), config.target_size)
            numbers = dict(zip(FRAMING_COLUMNS, framing, strict=True))
            rows.append({"image_file": f"{index}.src.png", "caption": caption, **numbers})
        pd.DataFrame(rows).to_csv(folder / "captions.csv", index=False)
    return folder


def _sort_files(
    files: list[pathlib.Path], source: pathlib.Path, root: pathlib.Path
) -> tuple[list[pathlib.Path], dict[pathlib.Path, pathlib.Path], list[pathlib.Path]]:
    """Split into images (in natural order), image → its mask, and everything else; the systems' litter is left out."""
    files = [path for path in files if not _is_litter(path.relative_to(root))]
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    masks = {path for path in pictures if path.name.endswith(".mask.png")}
    images = sorted(
        (path for path in pictures if path not in masks), key=lambda path: _natural(path.relative_to(root))
    )
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"{source.name} holds no pictures: put {kinds} files into it.")
    of_image = {image: mask for image in images if (mask := _mask_of(image)) in masks}
    others = [path for path in files if path not in set(pictures)]
    ignored = [path.name for path in others if path.suffix.lower() not in (".csv", ".txt")]
    if ignored:
        log.info("Ignored, being neither pictures nor captions: %s", ", ".join(sorted(ignored)[:10]))
    return images, of_image, others


def _is_litter(path: pathlib.Path) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") for part in path.parts) or path.name == "Thumbs.db"


def _mask_of(image: pathlib.Path) -> pathlib.Path:
    return image.with_name(image.name.removesuffix(".src.png") + ".mask.png")


def _natural(path: pathlib.Path) -> list[tuple[int, str]]:
    """Sort key that puts 2.png before 10.png."""
    digits = "".join(character if character.isdigit() else " " for character in path.name).split()
    return [(int(digits[0]) if digits else -1, str(path))]


def _frame(image: pathlib.Path, mask: pathlib.Path | None, stem: pathlib.Path, side: int) -> list[int]:
    """Write the square picture, and mask, under `stem`; return the values of `FRAMING_COLUMNS`."""
    picture = read_image(image)
    squared, framing = square(picture, side)
    squared.save(stem.with_name(f"{stem.name}.src.png"))
    if mask is not None:
        grey = read_image(mask).convert("L")
        if grey.size != picture.size:
            raise DatasetError(
                f"{mask.name} is {grey.size}, but {image.name} is {picture.size}: give both one size."
            )
        square(grey, side)[0].save(stem.with_name(f"{stem.name}.mask.png"))
    return [*framing.original_size, *framing.crop_top_left]


class Preprocessor(BaseRunner):
    """Pictures → a tar of the dataset folder, which `train` takes as it is."""

    def run(
        self,
        files: Path = Input(
            description="A .zip, .tar, .tar.gz or .tgz of pictures (jpg, png, webp, bmp), with captions or without."
        ),
        caption_text: str = Input(
            default="a photo of TOK",
            description="The caption of pictures that come without one.",
        ),
        target_size: Optional[int] = Input(
            default=None,
            description="Side of the square pictures, in pixels; a multiple of 8. Default: 1024.",
        ),
    ) -> Path:
        workspace = new_workspace("preprocess")
        config = PreprocessConfig(target_size=target_size or 1024, global_caption=caption_text)
        try:
            folder = prepare_dataset(fetch(str(files), workspace), workspace / "dataset", config=config)
            pack_tar({path.name: path for path in folder.iterdir()}, workspace / "data.tar")
            shutil.rmtree(folder)
        except BaseException:
            shutil.rmtree(workspace, ignore_errors=True)
            raise
        return Path(workspace / "data.tar")


if __name__ == "__main__":
    sys.exit(run_command_line(Preprocessor().run, description=(__doc__ or "").splitlines()[0]))

"""From an archive or folder of pictures to a dataset folder: `N.src.png`, `N.mask.png`, `captions.csv`.

The dataset folder is a seam: look at it, edit captions.csv, zip it, train on it. This file knows the public inputs and
the order of the stages; it does not know how a stage works, nor training.

    python preprocess.py -i files=@raw.zip -i caption_text="a photo of TOK" -i target_size=512 -o out/
"""

import functools
import logging
import pathlib
import shutil
import sys
import tempfile
from typing import Any, Optional

from cog import BaseRunner, Input, Path

from sdxl import settings
from sdxl.command_line import run_command_line
from sdxl.data.advice import advise
from sdxl.data.captioning import find_captions, require_token, tokens_in
from sdxl.data.contact_sheet import dataset_sheet
from sdxl.data.dataset_folder import ADVICE, SHEET, open_source, write_captions
from sdxl.data.framed_pictures import frame_all
from sdxl.data.preparing import PreprocessConfig, find_salience, upscale_small, write_missing_captions
from sdxl.files.archives import pack_tar
from sdxl.files.fetching import fetch
from sdxl.process import configure_logging, workspace_of_run

log = logging.getLogger(__name__)

__all__ = ["PreprocessConfig", "Preprocessor", "prepare_dataset"]


def prepare_dataset(
    source: pathlib.Path,
    folder: pathlib.Path,
    *,
    config: PreprocessConfig,
    report: pathlib.Path | None = None,
) -> pathlib.Path:
    """Fill `folder` with the training set made of `source`, a zip, a tar or a folder of pictures; return `folder`.

    A picture of a finished dataset folder (`N.src.png` with its row of numbers in captions.csv) that has the size
    asked for stays as it is, byte by byte, with its mask, caption and numbers. Advice on the pictures goes to the log;
    with `report`, a folder, also into its advice.txt, beside a contact_sheet.jpg.

    Raises:
        ArchiveError, DatasetError, ContractError: see there; nothing of a failed run is read by later stages.
        DownloadError: mask_target_prompts are given, but the segmenter cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=folder.parent) as unpacked:
        files = open_source(source, pathlib.Path(unpacked))
        given = find_captions(files.images, files.others, files.root, global_caption=config.global_caption)
        if given is not None and config.token_map is not None:
            require_token(given, config.token_map, files.root)
        folder.mkdir(parents=True, exist_ok=True)
        salience = find_salience(files, config)
        pictures = frame_all(
            files,
            salience,
            folder,
            side=config.target_size,
            bucketing=config.bucketing,
            around_salience=config.crop_based_on_salience,
        )
        upscale_small(pictures, folder)
        texts = write_missing_captions(pictures, given, folder, config)
        if config.token_map is not None:
            require_token(dict(zip(files.images, texts, strict=True)), config.token_map, files.root)
    captions = {picture.file_name: text for picture, text in zip(pictures, texts, strict=True)}
    write_captions(folder / "captions.csv", captions, [picture.framing for picture in pictures])

    if config.token_map is not None:
        tokens = list(config.token_map.placeholders)
    else:  # the words in capitals, of the captions where they are given
        tokens = tokens_in(" ".join(given.values()) if given else "") or tokens_in(config.caption_prefix)
    advice = advise([picture.facts for picture in pictures], texts, tokens)
    for sentence in advice:
        log.info("Advice: %s", sentence)
    if report is not None:
        (report / ADVICE).write_text(
            "\n".join(advice or ["Nothing to complain about."]) + "\n", encoding="utf-8"
        )
        dataset_sheet(folder, captions).save(report / SHEET, quality=88)
    return folder


class Preprocessor(BaseRunner):
    """Pictures → a tar of the dataset folder, which `train` takes as it is."""

    def run(
        self,
        files: Path = Input(
            description="A .zip, .tar, .tar.gz or .tgz of pictures (jpg, png, webp, bmp, heic), with captions or without."
        ),
        caption_text: str = Input(
            default="a photo of TOK",
            description="How the captions begin of pictures that come without: a captioner goes on from it. Name the subject with its token, but never as <s0>.",
        ),
        mask_target_prompts: Optional[str] = Input(
            default=None,
            description='Words for what matters in the pictures, such as "a dog" or "a dog, a red ball"; the rest is masked and not learned.',
        ),
        target_size: Optional[int] = Input(
            default=None,
            description="Side of the square pictures, in pixels, a multiple of 8, best from 512 to 1024. Default: the size the base was made for, 1024 for SDXL 1.0.",
        ),
        bucketing: bool = Input(
            default=False,
            description="Cut each picture to the nearest of several shapes of about target_size times target_size pixels instead of to a square: less is cut off.",
        ),
        crop_based_on_salience: bool = Input(
            default=True,
            description="Cut around what the mask shows instead of around the centre; without masks the centre it is.",
        ),
        use_face_detection_instead: bool = Input(
            default=False,
            description="Mask all faces instead of mask_target_prompts; faces are not cut where they fit.",
        ),
        temp: float = Input(
            default=1.0,
            description="How soft the masks' edges are: 0.5 is hard, 2 is soft.",
        ),
    ) -> Path:
        configure_logging()
        with workspace_of_run("preprocess") as workspace:
            config = PreprocessConfig(
                target_size=target_size or _base_size(),
                bucketing=bucketing,
                caption_prefix=caption_text,
                mask_target_prompts=mask_target_prompts,
                crop_based_on_salience=crop_based_on_salience,
                use_face_detection_instead=use_face_detection_instead,
                mask_temperature=temp,
            )
            archive = fetch(str(files), workspace / "fetched")
            folder = prepare_dataset(archive, workspace / "dataset", config=config, report=workspace)
            shutil.rmtree(workspace / "fetched", ignore_errors=True)
            members = {path.name: path for path in (*folder.iterdir(), workspace / SHEET, workspace / ADVICE)}
            pack_tar(members, workspace / "data.tar")
            shutil.rmtree(folder)
        return Path(workspace / "data.tar")


def _base_size() -> int:
    """The size of the base's pictures: 1024 unless `SDXL_BASE` names another that lies here as a folder."""
    folder = pathlib.Path(settings.base_name()).expanduser()
    if not folder.is_dir():
        return 1024
    from sdxl.model.components import native_resolution

    return native_resolution(folder)


def _with_report(**inputs: Any) -> list[pathlib.Path]:
    """On a command line the contact sheet and the advice lie beside the tar as well as in it."""
    tar = pathlib.Path(Preprocessor().run(**inputs))
    return [tar, tar.with_name(SHEET), tar.with_name(ADVICE)]


if __name__ == "__main__":
    sys.exit(
        run_command_line(
            functools.wraps(Preprocessor().run)(_with_report), description=(__doc__ or "").splitlines()[0]
        )
    )

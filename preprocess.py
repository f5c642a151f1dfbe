"""The preprocessing entry point: from an archive or folder of pictures to a dataset folder.

Knows the public inputs and the order of the stages; does not know how a stage works, nor training. Look at the dataset
folder (`N.src.png`, `N.mask.png`, `captions.csv`), edit captions.csv, pack it again and train on it.

    python preprocess.py -i files=@raw.zip -i caption_text="a photo of TOK" -i target_size=512 -o out/
"""

import dataclasses
import functools
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from cog import BaseRunner, CancelationException, Input, Path
from coglet import server

from sdxl import settings
from sdxl.command_line import run_command_line
from sdxl.data.advice import advise
from sdxl.data.caption_files import GivenCaptions, find_captions
from sdxl.data.caption_text import require_token, tokens_in
from sdxl.data.config import PreprocessConfig
from sdxl.data.contact_sheet import dataset_sheet
from sdxl.data.dataset_folder import ADVICE, SHEET, TABLE, earlier_framings, write_captions
from sdxl.data.framed_pictures import FramedPicture, frame_all
from sdxl.data.model_stages import find_salience, upscale_small, write_missing_captions
from sdxl.data.source_folder import Source, open_source
from sdxl.declared_inputs import as_declared, leave_downloads_to_us
from sdxl.files.archives import pack_tar, require_archive
from sdxl.files.fetching import fetch
from sdxl.process import configure_logging, exit_with, leave_at_once, repeat_on_cpu, start_logging
from sdxl.shutdown import stops_with_server
from sdxl.workspace import workspace_of_run

log = logging.getLogger(__name__)

__all__ = ["PreprocessConfig", "Preprocessor", "open_pictures", "prepare_dataset"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedPictures:
    """The files of a data set and the captions that come with them; None if there are none."""

    files: Source
    given: GivenCaptions | None


def open_pictures(source: pathlib.Path, folder: pathlib.Path, config: PreprocessConfig) -> OpenedPictures:
    """Find the pictures and captions of `source`, a zip or a tar to unpack into `folder`, or a folder.

    Needs neither models nor torch, so what is wrong here is told before either is fetched or imported.

    Raises:
        ArchiveError, ContractError, DatasetError: the archive, its table of captions or a caption is wrong, or there is no
            picture.
    """
    files = open_source(source, folder)
    given = find_captions(files, global_caption=config.global_caption)
    _require_tokens(given, config)
    return OpenedPictures(files=files, given=given)


def prepare_dataset(
    source: pathlib.Path | OpenedPictures,
    folder: pathlib.Path,
    *,
    config: PreprocessConfig,
    report: pathlib.Path | None = None,
    check: Callable[[Mapping[str, str]], object] = lambda captions: None,
    on_advice: Callable[[list[str]], object] = lambda advice: None,
) -> pathlib.Path:
    """Prepare the pictures of `source`, a zip, a tar, a folder or opened ones, in the dataset folder `folder`; return `folder`.

    A picture that comes from a dataset folder and already has a wanted size stays as it is, byte by byte, with its
    mask, caption and size conditioning. Advice goes to the log.

    report: a folder for advice.txt and contact_sheet.jpg.
    check: called before anything takes time, with each picture's name and its caption, or how its caption will begin.
        It may refuse them by an error.
    on_advice: takes the sentences of advice, perhaps none.

    Raises:
        ArchiveError, ContractError, DatasetError: the archive, its table of captions or its pictures are wrong.
        DownloadError, WeightsError: the segmenter is needed, but cannot be fetched or loaded.
    """
    for told in config.without_effect():
        log.warning("%s", told)
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=folder.parent) as unpacked:
        if not isinstance(source, OpenedPictures):
            source = open_pictures(source, pathlib.Path(unpacked), config)
        files, given = source.files, source.given
        beginnings = _beginnings(files, given, config)
        check({files.relative(image): text for image, text in beginnings.items()})
        earlier = {} if given is None else earlier_framings(given.rows)
        folder.mkdir(parents=True, exist_ok=True)
        salience = find_salience(files, config)
        pictures = frame_all(files, salience, earlier, folder, config)
        upscale_small(pictures)
        texts = write_missing_captions(pictures, None if given is None else given.texts, config)
    captions = {picture.file.name: text for picture, text in zip(pictures, texts, strict=True)}
    write_captions(folder / TABLE, captions, [picture.framing for picture in pictures])

    advice = _advise(pictures, texts, given, config)
    on_advice(advice)
    if report is not None:
        text = "\n".join(advice or ["Nothing to complain about."]) + "\n"
        (report / ADVICE).write_text(text, encoding="utf-8")
        dataset_sheet(folder, captions).save(report / SHEET, quality=88)
    return folder


def _require_tokens(given: GivenCaptions | None, config: PreprocessConfig) -> None:
    """Refuse captions without a token, if tokens are known. Captions by a model begin with the prefix."""
    if config.token_map is None:
        return
    if given is None:
        require_token(config.caption_prefix, config.token_map, "There are no captions, and caption_prefix")
    else:
        for picture, caption in given.texts.items():
            require_token(caption, config.token_map, given.source[picture])


def _beginnings(
    files: Source, given: GivenCaptions | None, config: PreprocessConfig
) -> Mapping[pathlib.Path, str]:
    """Each picture's caption, or how it will begin. The log says if the prefix is not used."""
    if given is None:
        return dict.fromkeys(files.images, config.caption_prefix)
    if config.caption_prefix.strip(" ,") != PreprocessConfig.caption_prefix.strip(" ,"):
        log.warning('"%s" is not used, because the pictures have captions.', config.caption_prefix)
    return given.texts


def _advise(
    pictures: Sequence[FramedPicture],
    captions: Sequence[str],
    given: GivenCaptions | None,
    config: PreprocessConfig,
) -> list[str]:
    """Log and return advice on the prepared pictures."""
    if config.token_map is not None:
        tokens = list(config.token_map.placeholders)
    else:  # guess: the words in capital letters, in the given captions or else in the prefix
        tokens = tokens_in(" ".join(given.texts.values()) if given else "") or tokens_in(
            config.caption_prefix
        )
    advice = advise([picture.facts for picture in pictures], captions, tokens)
    for sentence in advice:
        log.info("Advice: %s", sentence)
    return advice


class Preprocessor(BaseRunner):
    """Prepare pictures as a tar of the dataset folder, which `train` accepts as input_images."""

    def run(
        self,
        files: Path = Input(
            description="A .zip, .tar, .tar.gz or .tgz archive of pictures (jpg, png, webp, bmp or heic), with or without captions."
        ),
        caption_text: str = Input(
            default="a photo of TOK",
            description="How the captions begin if the archive contains none; a captioning model continues them. Name the subject by its token, not by a placeholder such as <s0>.",
        ),
        mask_target_prompts: Optional[str] = Input(
            default=None,
            description='What matters in the pictures, such as "a dog" or "a dog, a red ball". Everything else is masked.',
        ),
        target_size: Optional[int] = Input(
            default=None,
            description="Side of the square pictures in pixels: a multiple of 8, best from 512 to 1024. Default: the base's own size, 1024 for SDXL 1.0.",
        ),
        bucketing: bool = Input(
            default=False,
            description="Crop each picture to the nearest of several shapes, each of about target_size × target_size pixels, instead of to a square. Crops then lose less.",
        ),
        crop_based_on_salience: bool = Input(
            default=True,
            description="Crop around what the masks show instead of around the centre. Pictures without a mask are cropped around the centre.",
        ),
        use_face_detection_instead: bool = Input(
            default=False,
            description="Mask everything except faces, and ignore mask_target_prompts. Crops keep faces whole if they fit.",
        ),
        temp: float = Input(
            default=1.0,
            description="Softness of the masks' edges: 0.5 is hard, 2 is soft.",
        ),
    ) -> Path:
        # Wrong inputs are refused before anything imports torch.
        settings.set_behind_server(server.active)
        given = as_declared(self.run, locals())
        archive, size = given.pop("files"), given.pop("target_size")
        config = PreprocessConfig(
            target_size=PreprocessConfig.target_size if size is None else size,
            caption_prefix=given.pop("caption_text"),
            mask_temperature=given.pop("temp"),
            **given,
        )
        repeat_on_cpu()
        if server.active:
            leave_at_once()
        start_logging()
        with (
            workspace_of_run("preprocess", smaller="give smaller pictures") as workspace,
            stops_with_server(CancelationException),
        ):
            source = fetch(str(archive), workspace / "fetched")
            require_archive(source)
            pictures = open_pictures(source, workspace / "fetched" / "unpacked", config)
            configure_logging()
            if size is None:
                config = dataclasses.replace(config, target_size=_base_size())
            folder = prepare_dataset(pictures, workspace / "dataset", config=config, report=workspace)
            shutil.rmtree(workspace / "fetched", ignore_errors=True)
            members = {path.name: path for path in (*folder.iterdir(), workspace / SHEET, workspace / ADVICE)}
            pack_tar(members, workspace / "data.tar")
            shutil.rmtree(folder)
        return Path(workspace / "data.tar")


def _base_size() -> int:
    """The side of the base's own pictures: that of a local base folder, else SDXL 1.0's."""
    folder = pathlib.Path(settings.base_name()).expanduser()
    if not folder.is_dir():
        return PreprocessConfig.target_size
    from sdxl.model.components import native_resolution

    return native_resolution(folder)


def _run_with_report(**inputs: Any) -> list[pathlib.Path]:
    """Run the preprocessor; return the tar, and the contact sheet and advice next to it."""
    tar = pathlib.Path(Preprocessor().run(**inputs))
    return [tar, tar.with_name(SHEET), tar.with_name(ADVICE)]


leave_downloads_to_us(Preprocessor.run)

if __name__ == "__main__":
    about = (__doc__ or "").splitlines()[0]
    with_report = functools.wraps(Preprocessor().run)(_run_with_report)
    exit_with(lambda: run_command_line(with_report, description=about))

"""What people drop into the page: how files, folders and archives become pictures of a set.

    pictures/1/dropped/        as they came
               prepared/       the dataset folder that `preprocess.py` made of them

Knows how a drop becomes a dataset folder; does not know the page, or how pictures are prepared.
"""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdxl.data.caption_files import find_captions
from sdxl.data.dataset_folder import ADVICE, TABLE, read_dataset_folder
from sdxl.data.source_folder import ARCHIVE_SUFFIXES, Source, open_source
from sdxl.files.archives import pack_tar, unpack
from sdxl.studio import doors
from sdxl.studio.picture_set import PREPARED, Picture, PictureSet
from sdxl.studio.projects import Project

_DROPPED = "dropped"
_LOOSE = "What was dropped"
"""How messages call files that came without an archive."""


def add(pictures: PictureSet, dropped: Sequence[Path], *, names: Sequence[str] = ()) -> int:
    """Add pictures and archives; return how many pictures came. All of a drop come, or none.

    names: the files' paths in the folder that was dropped. Without them the files were dropped one by one.

    Raises:
        UserInputError: there is no picture among them, or the entry point refuses one.
    """
    if len(names) == len(dropped):
        archives, loose = [], dict(zip(names, dropped, strict=True))
    else:
        archives = [path for path in dropped if path.suffix.lower() in ARCHIVE_SUFFIXES]
        loose = _by_name([path for path in dropped if path not in archives])
    batches: list[Path] = []
    try:
        came = []
        for one in [*archives, *([loose] if loose else [])]:
            batches.append(pictures.project.new(pictures.folder.name))
            came += _prepared(pictures.project, batches[-1], one)
        pictures.append(came)
    except BaseException:
        for batch in batches:
            shutil.rmtree(batch, ignore_errors=True)
        raise
    return len(came)


def _by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Name → file. Two of one name come too."""
    found: dict[str, Path] = {}
    for number, file in enumerate(files):
        found[file.name if file.name not in found else f"{number}/{file.name}"] = file
    return found


def _prepared(project: Project, batch: Path, dropped: Path | dict[str, Path]) -> list[Picture]:
    """The pictures of an archive, or of files by their paths, prepared in the folder `batch`."""
    source = batch / _DROPPED
    if isinstance(dropped, dict):
        archive = batch / _LOOSE
        pack_tar(dropped, archive)  # unpacked by the rules for all archives: safe paths, and not too many
    else:
        archive = dropped
    files = open_source(archive, source)
    if archive != dropped:
        archive.unlink()
    images = _with_captions(files, project.about.plain_caption)
    advice = prepare(source, batch)
    names = [str(image.relative_to(source)) for image in images]
    return [
        Picture(
            batch=int(batch.name),
            number=number,
            name=name,
            original=f"{batch.name}/{_DROPPED}/{name}",
            caption=one.caption,
            advice=tuple(line.removeprefix(name).strip() for line in advice if _is_about(line, name)),
            original_size=one.framing.original_size,
            crop_top_left=one.framing.crop_top_left,
            target_size=one.framing.target_size,
        )
        for number, (one, name) in enumerate(zip(read_dataset_folder(batch / PREPARED), names, strict=True))
    ]


def _with_captions(files: Source, caption: str) -> list[Path]:
    """The pictures in the order in which they will be numbered. If there are no captions, all get this one."""
    if find_captions(files, global_caption=None) is None:
        with (files.root / TABLE).open("w", encoding="utf-8", newline="") as file:
            rows = [[files.relative(image), caption] for image in files.images]
            csv.writer(file).writerows([["image_file", "caption"], *rows])
    return files.images


def prepare(source: Path, batch: Path, **inputs: object) -> list[str]:
    """Let `preprocess.py` make the dataset folder `prepared` in `batch` of the files in `source`; return its advice.

    Raises:
        UserInputError: the entry point says why not.
    """
    output = batch / "out"
    doors.run(doors.command("preprocess", {"files": source, **inputs}, output), batch)
    prepared = batch / PREPARED
    shutil.rmtree(prepared, ignore_errors=True)
    unpack(output / "data.tar", prepared)
    advice = (prepared / ADVICE).read_text(encoding="utf-8").splitlines()
    shutil.rmtree(output)
    return advice


def _is_about(line: str, name: str) -> bool:
    """Whether a sentence of advice is about the picture `name`, and not about its caption, which may change."""
    return line.startswith(f"{name} ") and " has the caption " not in line

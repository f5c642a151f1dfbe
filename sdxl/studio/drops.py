"""What people drop into the page: how files, folders and archives become pictures of a set.

    pictures/1/dropped/        as they came
               prepared/       the dataset folder that `preprocess.py` made of them

Knows how a drop becomes a dataset folder; does not know the page, or how pictures are prepared.
"""

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sdxl.data.caption_files import find_captions
from sdxl.data.dataset_folder import ADVICE, TABLE, read_dataset_folder
from sdxl.data.source_folder import ARCHIVE_SUFFIXES, open_source
from sdxl.files.archives import pack_tar, unpack
from sdxl.studio import doors
from sdxl.studio.picture_set import PREPARED, Picture, PictureSet
from sdxl.studio.projects import Project

_DROPPED = "dropped"


def add(pictures: PictureSet, dropped: Sequence[Path]) -> int:
    """Add pictures, folders' files and archives; return how many pictures came. All of a drop come, or none.

    Raises:
        UserInputError: a file is no picture and no archive, or the entry point refuses it.
    """
    archives = [path for path in dropped if path.suffix.lower() in ARCHIVE_SUFFIXES]
    loose = [path for path in dropped if path not in archives]
    fills: list[Callable[[Path], object]] = [lambda source, one=one: unpack(one, source) for one in archives]
    if loose:
        fills.append(lambda source: _copy_all(loose, source))
    batches: list[Path] = []
    try:
        came = []
        for fill in fills:
            batches.append(pictures.project.new(pictures.folder.name))
            came += _prepared(pictures.project, batches[-1], fill)
        pictures.append(came)
    except BaseException:
        for batch in batches:
            shutil.rmtree(batch, ignore_errors=True)
        raise
    return len(came)


def _prepared(project: Project, batch: Path, fill: Callable[[Path], object]) -> list[Picture]:
    """The pictures that `fill` puts into a folder, prepared in the folder `batch`."""
    source = batch / _DROPPED
    source.mkdir()
    fill(source)
    images = _with_captions(source, project.about.plain_caption)
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


def _with_captions(source: Path, caption: str) -> list[Path]:
    """The pictures in the order in which they will be numbered. If there are no captions, all get this one."""
    files = open_source(source, source)
    if find_captions(files, global_caption=None) is None:
        with (source / TABLE).open("w", encoding="utf-8", newline="") as file:
            rows = [[files.relative(image), caption] for image in files.images]
            csv.writer(file).writerows([["image_file", "caption"], *rows])
    return files.images


def prepare(source: Path, batch: Path, **inputs: object) -> list[str]:
    """Let `preprocess.py` make the dataset folder `prepared` in `batch` of the files in `source`; return its advice.

    Raises:
        UserInputError: the entry point says why not.
    """
    archive, output = batch / "source.tar", batch / "out"
    pack_tar({str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}, archive)
    doors.run(doors.command("preprocess", {"files": archive, **inputs}, output), batch)
    archive.unlink()
    prepared = batch / PREPARED
    shutil.rmtree(prepared, ignore_errors=True)
    unpack(output / "data.tar", prepared)
    advice = (prepared / ADVICE).read_text(encoding="utf-8").splitlines()
    shutil.rmtree(output)
    return advice


def _is_about(line: str, name: str) -> bool:
    """Whether a sentence of advice is about the picture `name`, and not about its caption, which may change."""
    return line.startswith(f"{name} ") and " has the caption " not in line


def _copy_all(files: Sequence[Path], folder: Path) -> None:
    """Copy dropped files. Two of one name, from two folders, both come."""
    for number, file in enumerate(files):
        target = folder / file.name
        shutil.copyfile(file, target if not target.exists() else folder / f"{number}-{file.name}")

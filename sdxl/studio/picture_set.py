"""The pictures of a project: as they came, as they will be cut, and what a person changed about them.

    pictures/1/dropped/        as they came
               prepared/       the dataset folder that `preprocess.py` made of them
    pictures/set.json         one entry for each picture, in order

Knows how drops become a set, and a set the archive that `train` takes; does not know the page or how pictures are prepared.
"""

import contextlib
import csv
import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdxl.data.advice import FEW
from sdxl.data.caption_files import find_captions
from sdxl.data.caption_text import check_caption_text, count_token, one_line, tokens_in
from sdxl.data.dataset_folder import (
    ADVICE,
    TABLE,
    large_file,
    mask_file,
    read_dataset_folder,
    write_captions,
)
from sdxl.data.framing import Framing
from sdxl.data.source_folder import open_source
from sdxl.errors import DatasetError, UserInputError
from sdxl.files.archives import pack_tar, unpack
from sdxl.studio import doors
from sdxl.studio.projects import Project, read_json, write_json

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_SET = "set.json"
MOST_PICTURES = 200
"""In a set. The page shows each of them."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a set."""

    batch: int
    """The number of the drop that it came with."""
    number: int
    """Its number in the dataset folder of that drop."""
    name: str
    """What people called the file."""
    original: str
    """The file as it came, relative to the folder of the set."""
    caption: str
    used: bool = True
    advice: tuple[str, ...] = ()
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    """These three are fields of `Framing`."""

    @property
    def key(self) -> str:
        """Its name in the page."""
        return f"{self.batch}-{self.number}"

    @property
    def framing(self) -> Framing:
        return Framing(
            original_size=self.original_size,
            crop_top_left=self.crop_top_left,
            target_size=self.target_size,
        )


class PictureSet:
    """The pictures of one project."""

    def __init__(self, project: Project) -> None:
        self.project, self.folder = project, project.pictures

    # Reading ------------------------------------------------------------------------------------------------------------

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        return [_picture(entry) for entry in read_json(self.folder / _SET, [])]

    @property
    def used(self) -> list[Picture]:
        """Those that will be learned."""
        return [picture for picture in self.pictures if picture.used]

    def find(self, key: str) -> Picture:
        """The picture `key`.

        Raises:
            UserInputError: there is none.
        """
        for picture in self.pictures:
            if picture.key == key:
                return picture
        raise UserInputError("This picture is not in the set any more: reload the page.")

    def prepared(self, picture: Picture) -> Path:
        """The file of a picture as it will be learned."""
        return self.folder / str(picture.batch) / "prepared" / f"{picture.number}.src.png"

    def original(self, picture: Picture) -> Path:
        """The file of a picture as it came."""
        return self.folder / picture.original

    def mask(self, picture: Picture) -> Path | None:
        """The file of its mask, of the prepared picture's size; None if all of it matters."""
        mask = mask_file(self.prepared(picture))
        return mask if mask.exists() else None

    # Adding -------------------------------------------------------------------------------------------------------------

    def add(self, dropped: Sequence[Path]) -> int:
        """Add pictures, folders' files and archives; return how many pictures came. All of a drop come, or none.

        Raises:
            UserInputError: a file is no picture and no archive, or the entry point refuses it.
        """
        archives = [path for path in dropped if path.name.lower().endswith(_ARCHIVES)]
        loose = [path for path in dropped if path not in archives]
        came = []
        for group in ([archive] for archive in archives):
            came += self._prepared_batch(lambda source, group=group: unpack(group[0], source))
        if loose:
            came += self._prepared_batch(lambda source: _copy_all(loose, source))
        with self._alone():
            pictures = self.pictures
            if len(pictures) + len(came) > MOST_PICTURES:
                raise DatasetError(
                    f"That makes {len(pictures) + len(came)} pictures, but the studio shows at most {MOST_PICTURES}: for one "
                    "subject the best 20 are enough."
                )
            self._write([*pictures, *came])
        return len(came)

    def _prepared_batch(self, fill: Callable[[Path], object]) -> list[Picture]:
        """The pictures of one drop. fill: puts the files into a folder."""
        batch = self.project.new(self.folder.name)
        try:
            source = batch / "dropped"
            source.mkdir()
            fill(source)
            names = self._name_captions(source)
            log = prepare(source, batch)
            return self._read_batch(batch, names, log)
        except BaseException:
            shutil.rmtree(batch, ignore_errors=True)
            raise

    def _name_captions(self, source: Path) -> list[Path]:
        """The pictures in the order in which they will be numbered. Those without captions get a plain one."""
        files = open_source(source, source)
        if find_captions(files, global_caption=None) is None:
            with (source / TABLE).open("w", encoding="utf-8", newline="") as file:
                rows = [[files.relative(image), self.project.about.plain_caption] for image in files.images]
                csv.writer(file).writerows([["image_file", "caption"], *rows])
        return files.images

    def _read_batch(self, batch: Path, images: Sequence[Path], advice: Sequence[str]) -> list[Picture]:
        prepared = read_dataset_folder(batch / "prepared")
        found = []
        for number, (one, image) in enumerate(zip(prepared, images, strict=True)):
            name = str(image.relative_to(batch / "dropped"))
            found.append(
                Picture(
                    batch=int(batch.name),
                    number=number,
                    name=name,
                    original=str(image.relative_to(self.folder)),
                    caption=one.caption,
                    advice=tuple(line.removeprefix(name).strip() for line in advice if _is_about(line, name)),
                    original_size=one.framing.original_size,
                    crop_top_left=one.framing.crop_top_left,
                    target_size=one.framing.target_size,
                )
            )
        return found

    # Changing -----------------------------------------------------------------------------------------------------------

    def change(self, key: str, **changed: object) -> Picture:
        """Change fields of the picture `key`; return it.

        Raises:
            UserInputError: there is no such picture, or its caption holds what no caption may.
        """
        if "caption" in changed:
            changed["caption"] = one_line(str(changed["caption"]))
            check_caption_text(str(changed["caption"]), f"The caption of {self.find(key).name}")
        with self._alone():
            new = replace(self.find(key), **changed)  # type: ignore[arg-type]
            self._write([new if one.key == key else one for one in self.pictures])
        return new

    def insert_word(self, *, instead_of: str = "") -> int:
        """Let every caption name the subject by its word; return how many were changed.

        instead_of: the word that it had before; by default one that all captions without the new word have.
        """
        with self._alone():
            about, changed, pictures = self.project.about, 0, []
            instead_of = instead_of or self._other_word()
            for picture in self.pictures:
                caption = picture.caption
                if instead_of and count_token(caption, instead_of):
                    caption = re.sub(rf"(?<!\w){re.escape(instead_of)}(?!\w)", about.word, caption)
                elif not count_token(caption, about.word):
                    caption = f"{about.plain_caption}, {caption}" if caption else about.plain_caption
                changed += caption != picture.caption
                pictures.append(replace(picture, caption=caption))
            self._write(pictures)
        return changed

    def _other_word(self) -> str:
        """The word by which all captions without the project's word call the subject; empty if there is none."""
        word = self.project.about.word
        found = [set(tokens_in(one.caption)) for one in self.pictures if not count_token(one.caption, word)]
        common = set.intersection(*found) if found else set()
        return common.pop() if len(common) == 1 else ""

    def set_captions(self, captions: Mapping[str, str]) -> None:
        """Give the pictures with these keys new captions."""
        with self._alone():
            self._write(
                [replace(one, caption=one_line(captions.get(one.key, one.caption))) for one in self.pictures]
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the set meanwhile: two captions may be written at once, in two tabs too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, pictures: Sequence[Picture]) -> None:
        write_json(self.folder / _SET, [asdict(picture) for picture in pictures])

    # The archive --------------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What keeps the set from being trained on, or is worth a remark."""
        used, word = self.used, self.project.about.word
        told = []
        if 0 < len(used) < FEW:
            told.append(f"{len(used)} pictures are few: 5 to 20 varied ones teach a subject far better.")
        if without := [one.name for one in used if not count_token(one.caption, word)]:
            told.append(f"{len(without)} captions do not name {word}: press “Put {word} into every caption”.")
        if len(used) > 1 and len({one.caption for one in used}) == 1:
            told.append("All captions are equal: say what else each picture shows, such as the place.")
        return told

    def pack(self, target: Path) -> Path:
        """Write the pictures that are used as the archive that `train` takes.

        Raises:
            DatasetError: there are none.
        """
        used = self.used
        if not used:
            raise DatasetError("There are no pictures yet: add some in step 1.")
        files: dict[str, Path] = {}
        for number, picture in enumerate(used):
            prepared = self.prepared(picture)
            kinds = {"src": prepared, "mask": mask_file(prepared), "large": large_file(prepared)}
            files |= {f"{number}.{kind}.png": path for kind, path in kinds.items() if path.exists()}
        table = target.with_name(TABLE)
        target.parent.mkdir(parents=True, exist_ok=True)
        captions = {f"{number}.src.png": picture.caption for number, picture in enumerate(used)}
        write_captions(table, captions, [picture.framing for picture in used])
        pack_tar(files | {TABLE: table}, target)
        table.unlink()
        return target


def prepare(source: Path, batch: Path, **inputs: object) -> list[str]:
    """Let `preprocess.py` make the dataset folder `prepared` in `batch` of the files in `source`; return its advice."""
    archive, output = batch / "source.tar", batch / "out"
    pack_tar({str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}, archive)
    doors.run(doors.command("preprocess", {"files": archive, **inputs}, output), batch)
    archive.unlink()
    prepared = batch / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    unpack(output / "data.tar", prepared)
    advice = (prepared / ADVICE).read_text(encoding="utf-8").splitlines()
    shutil.rmtree(output)
    return advice


def _picture(entry: dict[str, Any]) -> Picture:
    pairs = ("original_size", "crop_top_left", "target_size", "advice")
    return Picture(**{**entry, **{name: tuple(entry[name]) for name in pairs}})


def _is_about(line: str, name: str) -> bool:
    """Whether a sentence of advice is about the picture `name`, and not about its caption, which may change."""
    return line.startswith(f"{name} ") and " has the caption " not in line


def _copy_all(files: Sequence[Path], folder: Path) -> None:
    """Copy dropped files. Two of one name, from two folders, both come."""
    for number, file in enumerate(files):
        target = folder / file.name
        shutil.copyfile(file, target if not target.exists() else folder / f"{number}-{file.name}")

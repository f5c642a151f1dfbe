"""The pictures of a project: as they came, as they will be cut, and what a person changed about them.

    pictures/1/               see `drops`
    pictures/set.json         one entry for each picture, in order

Knows the set, and how it becomes the archive that `train` takes; does not know the page, or how pictures come into the set.
"""

import contextlib
import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdxl.data.advice import on_equal_captions, on_number
from sdxl.data.caption_text import check_caption_text, count_token, one_line, tokens_in
from sdxl.data.dataset_folder import (
    TABLE,
    large_file,
    mask_file,
    write_captions,
)
from sdxl.data.framing import Framing
from sdxl.errors import DatasetError, UserInputError
from sdxl.files.archives import pack_tar
from sdxl.report.overview import counted
from sdxl.studio.projects import Project, read_json, write_json

PREPARED = "prepared"
"""The folder of a drop's prepared pictures."""
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
        return self.folder / str(picture.batch) / PREPARED / f"{picture.number}.src.png"

    def original(self, picture: Picture) -> Path:
        """The file of a picture as it came."""
        return self.folder / picture.original

    def mask(self, picture: Picture) -> Path | None:
        """The file of its mask, of the prepared picture's size; None if all of it matters."""
        mask = mask_file(self.prepared(picture))
        return mask if mask.exists() else None

    def whole_mask_file(self, picture: Picture) -> Path:
        """The file that keeps the mask of the whole picture while its crop moves."""
        return self.prepared(picture).with_name(f"{picture.number}.whole-mask.png")

    # Changing -----------------------------------------------------------------------------------------------------------

    def append(self, came: Sequence[Picture]) -> None:
        """Add prepared pictures.

        Raises:
            DatasetError: that would be too many.
        """
        with self._alone():
            pictures = [*self.pictures, *came]
            if len(pictures) > MOST_PICTURES:
                raise DatasetError(
                    f"That makes {len(pictures)} pictures, but the studio shows at most {MOST_PICTURES}: for one subject the "
                    "best 20 are enough."
                )
            self._write(pictures)

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
        told = on_number(len(used)) if used else []
        if without := self._without_word():
            told.append(f"{without} without {word}: press “Put the word into every caption”.")
        return told + on_equal_captions([one.caption for one in used])

    def _without_word(self) -> str:
        """How many captions do not name the word, with the noun; empty if all do."""
        word = self.project.about.word
        number = sum(not count_token(one.caption, word) for one in self.used)
        return counted(number, "caption") + (" is" if number == 1 else " are") if number else ""

    def require_word(self) -> None:
        """Refuse captions that do not name the word.

        Raises:
            DatasetError: there are some.
        """
        if without := self._without_word():
            raise DatasetError(
                f"{without} without {self.project.about.word}, and a picture without it teaches it nothing: in step 1 press "
                "“Put the word into every caption”, or leave these pictures out."
            )

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


def _picture(entry: dict[str, Any]) -> Picture:
    pairs = ("original_size", "crop_top_left", "target_size", "advice")
    return Picture(**{**entry, **{name: tuple(entry[name]) for name in pairs}})

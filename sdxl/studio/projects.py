"""Projects on disk: a folder for each subject, with its name, its pictures, its trainings and what was drawn.

    studio_out/3f0a9c1be2d4/project.json    name, kind, word
                            pictures/       see `picture_set`
                            trainings/1/    see `trainings`
                            drawn/          pictures, newest last

Two tabs have two projects, so they do not disturb each other. Knows names and folders; does not know what is in them.
"""

import json
import re
import secrets
import time
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdxl.data.caption_text import one_line
from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path

_ABOUT = "project.json"
_KEY = re.compile(r"[0-9a-f]{12}")
STYLE = "style"
KINDS = ("dog", "cat", "person", "man", "woman", "child", "toy", "doll", "car", "house", "bag", "shoe", STYLE)
"""Suggestions; any word is a kind."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a person said about the subject."""

    name: str = ""
    """As people call it, such as "Rex"."""
    kind: str = ""
    """What it is, in one common word, such as "dog"; may be empty."""

    @property
    def word(self) -> str:
        """How captions and prompts call it, such as "REX": letters and underscores."""
        plain = unicodedata.normalize("NFKD", self.name).encode("ascii", "ignore").decode()
        word = re.sub(r"[^A-Z]+", "_", plain.upper()).strip("_")[:24].strip("_")
        return word if len(word) > 1 else "TOK"

    @property
    def plain_caption(self) -> str:
        """The caption that a picture begins with."""
        return f"a picture in the style of {self.word}" if self.kind == STYLE else f"a photo of {self.word}"


class Project:
    """One project. What it holds is read from the disk anew, since another tab may have changed it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def key(self) -> str:
        """The name of its folder, and its place in the page's address."""
        return self.folder.name

    @property
    def about(self) -> About:
        """What was said about the subject."""
        return About(**read_json(self.folder / _ABOUT, {}))

    def tell(self, about: About) -> None:
        """Keep what was said about the subject, in one line each."""
        clean = About(name=one_line(about.name)[:60], kind=one_line(about.kind).lower()[:40])
        if clean != self.about:
            write_json(self.folder / _ABOUT, asdict(clean))

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def trainings(self) -> Path:
        return self.folder / "trainings"

    @property
    def drawn(self) -> Path:
        return self.folder / "drawn"

    def new(self, name: str) -> Path:
        """A new empty folder, numbered, under the folder `name` of the project."""
        parent = self.folder / name
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
        while True:
            try:
                (parent / str(number)).mkdir()
            except FileExistsError:  # another tab was faster
                number += 1
            else:
                return parent / str(number)


@dataclass(frozen=True)
class Projects:
    """All projects, in one folder."""

    folder: Path

    def create(self) -> Project:
        """A new project. Nothing is written until something is in it."""
        return Project(self.folder / secrets.token_hex(6))

    def open(self, key: object) -> Project:
        """The project `key`, which may come from an address; a new one if it names none."""
        if isinstance(key, str) and _KEY.fullmatch(key):
            return Project(self.folder / key)
        return self.create()

    def require(self, key: object) -> Project:
        """The project `key`.

        Raises:
            UserInputError: it is no key.
        """
        if not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise UserInputError("This page has lost its project: reload it.")
        return Project(self.folder / key)

    def all(self) -> list[tuple[str, str]]:
        """(what people see, key) of the projects with something in them, the newest first."""
        found = {path.parent for name in (_ABOUT, "pictures/*") for path in self.folder.glob(f"*/{name}")}
        newest = sorted(
            (path for path in found if _KEY.fullmatch(path.name)),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        return [(_shown(Project(path)), path.name) for path in newest]


def _shown(project: Project) -> str:
    day = time.strftime("%d %b, %H:%M", time.localtime(project.folder.stat().st_mtime))
    return f"{project.about.name or 'Without a name'} ({day})"


def read_json(path: Path, default: Any) -> Any:
    """What `path` holds, or `default` if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default


def write_json(path: Path, value: Any) -> None:
    """Write `path` whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")

"""Find the pictures that a name means: in a row of a table, or in the name of a file beside them.

Knows names as people and systems write them; does not know what is in the files.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

Index = Mapping[str, list[Path]]


def _nfc(text: str) -> str:
    """`text` with composed accents, as most systems write them. macOS writes decomposed ones."""
    return unicodedata.normalize("NFC", text)


def _loose(text: str) -> str:
    return _nfc(_nfc(text).casefold())


_QUOTES = str.maketrans("‘’‚“”„", "'''\"\"\"")


def _as_seen(text: str) -> str:
    """What a reader takes for the same: without invisible characters, and with plain spaces, quotes and letters."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    visible = (
        letter for letter in text if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cf")
    )
    return _loose(" ".join("".join(visible).split()))


_FORMS: tuple[Callable[[str], str], ...] = (str, _nfc, _loose, _as_seen)
"""Names are compared exactly, then with composed accents, then without case, then as they look."""


class PictureNames:
    """The pictures of a data set by their names. A search takes the same time for ten pictures as for ten thousand."""

    def __init__(self, images: Iterable[Path], root: Path) -> None:
        self._root = root
        relative = {image: PurePosixPath(image.relative_to(root)) for image in images}
        self._paths = _indexes({image: str(path) for image, path in relative.items()})
        self._names = _indexes({image: path.name for image, path in relative.items()})
        self._path_stems = _indexes({image: str(path.with_suffix("")) for image, path in relative.items()})
        self._stems = _indexes({image: path.stem for image, path in relative.items()})

    def named(self, name: str, folder: Path) -> list[Path]:
        """The pictures that `name`, written in a file in `folder`, means; several if it is ambiguous.

        Tries the path from the root, the path from `folder`, the file name, and the file name without its suffix. Of an
        address in the web, its path counts.
        """
        if "://" in name:
            name = re.split("[?#]", name)[0]
        return self._named(name, folder) or self._named(unquote(name), folder)

    def _named(self, name: str, folder: Path) -> list[Path]:
        wanted = PurePosixPath(name.replace("\\", "/"))
        here = PurePosixPath(folder.relative_to(self._root))
        return (
            _search(self._paths, str(wanted))
            or _search(self._paths, str(here / wanted))
            or _search(self._names, wanted.name)
            or _search(self._stems, wanted.name)
            or _search(self._stems, wanted.stem)
        )

    def beside(self, file: Path) -> list[Path]:
        """The pictures to which `file` belongs by its own name: 1.txt or 1.jpg.txt to 1.jpg.

        Pictures in its own folder come first. In another folder there must be just one such picture.
        """
        own = PurePosixPath(file.relative_to(self._root)).with_suffix("")
        found = _search(self._path_stems, str(own)) or _search(self._paths, str(own))
        if found:
            return found
        elsewhere = _search(self._stems, own.name) or _search(self._names, own.name)
        return elsewhere if len(elsewhere) == 1 else []


def _indexes(names: Mapping[Path, str]) -> list[Index]:
    """One index for each of `_FORMS`."""
    indexes = []
    for form in _FORMS:
        index: dict[str, list[Path]] = defaultdict(list)
        for image, name in names.items():
            index[form(name)].append(image)
        indexes.append(dict(index))
    return indexes


def _search(indexes: list[Index], name: str) -> list[Path]:
    for form, index in zip(_FORMS, indexes, strict=True):
        if found := index.get(form(name)):
            return found
    return []

"""Which sources a request may name: anything on the command line, less from strangers behind a server.

Knows kinds of sources and the operator's settings; does not fetch anything.
"""

import re
from pathlib import Path

from sdxl import settings
from sdxl.errors import UserInputError, shortened
from sdxl.files.fetching import existing, is_remote

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The name of a repository on the Hugging Face hub."""
HUB_FILE = re.compile(
    HUB_NAME.pattern + r"(?:/[A-Za-z0-9_][^/\x00-\x1f]*)*/[A-Za-z0-9_][^/\x00-\x1f]*\.safetensors"
)
"""The name of a safetensors file in such a repository, also in a folder there."""


def allowed_base(source: str | None, name: str) -> str | None:
    """The source of a base as the server may use it, by the rules of `allowed_fine_tune`.

    It may also be the name of a safetensors file in a hub repository.
    """
    if source and HUB_FILE.fullmatch(source) and existing(source) is None:
        return source
    return allowed_fine_tune(source, name)


def allowed_state(source: str | None, name: str) -> str | None:
    """The source of a training's state as the server may use it: there it is "auto", a URL or a `data:` URI.

    name: the input's name.

    Raises:
        UserInputError: a path, behind a server.
    """
    if not source or source == "auto" or not settings.behind_server() or is_remote(source):
        return source or None
    raise UserInputError(
        f"{name} is {shortened(source)}, but this server takes no paths: write auto, or give an http(s) URL or a data: URI."
    )


def allowed_fine_tune(source: str | None, name: str) -> str | None:
    """The source of a fine-tune as the server may use it; None and an empty text, which stand for none, as they are.

    On the command line that is `source` itself.

    Behind a server it may be a URL, a `data:` URI, the name of a hub repository or of a file in one, or a path in the folder
    that `SDXL_FINE_TUNES` names. What is outside that folder does not exist for strangers, also behind links.

    name: the input's name.

    Raises:
        UserInputError: any other path.
    """
    if not source or not settings.behind_server() or is_remote(source):
        return source
    folder = settings.fine_tunes_folder()
    if folder is not None and (inside := _inside(source, folder)) is not None:
        return str(inside)
    if (HUB_NAME.fullmatch(source) or HUB_FILE.fullmatch(source)) and existing(source) is None:
        return source
    also = " or the name of a fine-tune of this server" if folder is not None else ""
    raise UserInputError(
        f"{name} is {shortened(source)}, but this server takes no paths: give an http(s) URL, a data: URI, the name of a "
        f"hub repository{also}."
    )


def _inside(source: str, folder: Path) -> Path | None:
    """The file or folder `source` in `folder`, all of whose files are in it too; None if there is none."""
    try:
        root = folder.resolve()
        path = (root / source).resolve()
        if path == root or not path.is_relative_to(root):
            return None
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        fine = all(
            (file.is_file() or file.is_dir()) and file.resolve().is_relative_to(root) for file in files
        )
        return path if fine else None
    except (OSError, ValueError, RuntimeError):  # too long, characters that no name may have, a loop of links
        return None

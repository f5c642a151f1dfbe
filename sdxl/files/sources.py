"""Which sources a request may name: anything on the command line, less from strangers behind a server.

Knows kinds of sources and the operator's settings; does not fetch anything. What cannot exist is refused at once, before models
are loaded.
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
_FILES = (".tar", ".tar.gz", ".tgz", ".zip", ".safetensors")
"""What ends so is a file that is missing rather than a repository."""
_REMOTE = "an http(s) URL or a data: URI"


def allowed_file(source: str, name: str, *, others: str = _REMOTE) -> str:
    """The source of an archive or a picture as the server may use it: a URL, a `data:` URI or a path in `SDXL_INPUTS`.

    On the command line that is `source` itself.

    name: the input's name.
    others: what to give instead of a path, for the message.

    Raises:
        UserInputError: another path, behind a server.
    """
    if not settings.behind_server() or is_remote(source):
        return source
    folders = _folders(settings.inputs_folder())
    inside = _inside(source, folders)
    if inside is None:
        raise _refusal(source, name, folders, others)
    return str(inside)


def allowed_state(source: str | None, name: str) -> str | None:
    """The source of a training's state as the server may use it: "auto", or what `allowed_file` allows.

    Raises:
        UserInputError: another path behind a server, or one that does not exist.
    """
    if not source or source == "auto":
        return source or None
    allowed = allowed_file(source, name, others=f"auto, {_REMOTE}")
    if not is_remote(allowed) and existing(allowed) is None:
        raise UserInputError(
            f"{name} is {shortened(source)}, which does not exist: give auto, an existing state, a data: URI or an http(s) URL."
        )
    return allowed


def allowed_fine_tune(source: str | None, name: str) -> str | None:
    """The source of a fine-tune or a base as the server may use it; None and an empty text, which stand for none, as they are.

    On the command line that is `source` itself.

    Behind a server it may be a URL, a `data:` URI, the name of a hub repository or of a file in one, or a path in the folders
    that `SDXL_FINE_TUNES` and `SDXL_INPUTS` name. What is outside does not exist for strangers, also behind links.

    name: the input's name.

    Raises:
        UserInputError: another path behind a server, or one that does not exist.
    """
    if not source or is_remote(source):
        return source
    if not settings.behind_server():
        if existing(source) is None and not _is_on_hub(source):
            raise UserInputError(
                f"{name} is {shortened(source)}, which does not exist: give an existing file, a data: URI, an http(s) URL or "
                "the name of a hub repository."
            )
        return source
    folders = _folders(settings.fine_tunes_folder(), settings.inputs_folder())
    if (inside := _inside(source, folders)) is not None:
        return str(inside)
    if _is_on_hub(source) and existing(source) is None:
        return source
    raise _refusal(source, name, folders, "an http(s) URL, a data: URI or the name of a hub repository")


def _is_on_hub(source: str) -> bool:
    """Whether `source` may be the name of a hub repository or of a file in one."""
    if HUB_FILE.fullmatch(source):
        return True
    return HUB_NAME.fullmatch(source) is not None and not source.lower().endswith(_FILES)


def _folders(*folders: Path | None) -> list[Path]:
    return [folder for folder in folders if folder is not None and folder.is_dir()]


def _refusal(source: str, name: str, folders: list[Path], others: str) -> UserInputError:
    opened = " or ".join(dict.fromkeys(folder.name for folder in folders))
    where, also = (f" outside its folder {opened}", "a file in it, ") if opened else ("", "")
    return UserInputError(
        f"{name} is {shortened(source)}, but this server takes no paths{where}: give {also}{others}."
    )


def _inside(source: str, folders: list[Path]) -> Path | None:
    """The file or folder `source`, all of whose files are in one of `folders`; None if there is none.

    source: relative to the folder or to the working folder, or absolute.
    """
    for folder in folders:
        for start in (folder, Path()):
            try:
                root = folder.resolve()
                path = (start / source).resolve()
                if path != root and path.is_relative_to(root) and _stays_in(root, path):
                    return path
            except (
                OSError,
                ValueError,
                RuntimeError,
            ):  # too long, characters that no name may have, a loop of links
                continue
    return None


def _stays_in(root: Path, path: Path) -> bool:
    """Whether `path` exists and all of its files, also behind links, are in `root`."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return all((file.is_file() or file.is_dir()) and file.resolve().is_relative_to(root) for file in files)

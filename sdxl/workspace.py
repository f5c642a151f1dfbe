"""The folder of one run: created, locked while the run lasts, and swept when nobody needs it any longer.

Knows what may be left in such a folder; does not know what a run does.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from sdxl import settings
from sdxl.errors import NotEnoughMemoryError, StorageError, UserInputError

log = logging.getLogger(__name__)

_PREFIX = "sdxl-"
_INTERMEDIATE = ("fetched", "dataset", "unpacked-*", "*.partial", ".*.partial")
"""What a finished run has removed."""
OUTPUT, CHECKPOINTS = "training_out", "checkpoints"
"""The folder in which a training collects its result, and the folder of earlier steps in it. The latter is kept, because it
can replace a lost result."""
PREVIEWS = "previews"
"""The folder of previews in the result."""
RESULT = "trained_model.tar"
"""The result of a training. It appears complete, by one rename, so a killed run that has it was finished."""
REPORT = "report.html"
"""The page for people in the result, and next to it."""
EVENTS = "tensorboard"
"""The folder of event files in the result."""


@contextlib.contextmanager
def workspace_of_run(name: str, *, smaller: str = "give less work at once") -> Iterator[Path]:
    """Create a folder for one run of an entry point, and remove it if the run fails or is cancelled.

    Checkpoints and a finished result survive a failure. What earlier runs left is swept first; see `sweep`. Logs the
    traceback of any error that is not a `UserInputError`, because Cog shows only the message.

    smaller: what makes a run smaller, for the message when memory runs out.

    Raises:
        StorageError: the disk refuses to write, during the run too.
        NotEnoughMemoryError: memory ran out during the run.
    """
    parent = settings.workspace_parent()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        workspace = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=parent))
    except OSError as error:
        raise StorageError.of(error, parent) from error
    handle = os.open(workspace, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the system releases it if the process dies
        yield workspace
    except BaseException as error:
        told = StorageError.behind(error) or NotEnoughMemoryError.behind(error, smaller=smaller)
        if told is None and isinstance(error, Exception) and not isinstance(error, UserInputError):
            log.exception("The run %s failed.", name)
        if (kept := _discard(workspace)) is not None:
            log.info("What was finished is in %s", kept)
        if told is not None:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that fill the memory
            raise told from error
        raise
    finally:
        os.close(handle)


def sweep(parent: Path) -> None:
    """Remove what earlier runs left in `parent`. Folders of running processes are locked, and stay as they are.

    - Behind a server, results have been delivered: whole folders are removed `SDXL_KEEP_MINUTES` after their last change.
    - Elsewhere, the caller may still need the results: only what killed runs left half done is removed.

    Checkpoints stay in both cases.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                age = time.time() - folder.stat().st_mtime
                delivered = settings.behind_server() and age > settings.keep_seconds()
                half_done = any(any(folder.glob(pattern)) for pattern in _INTERMEDIATE)
                # A run that was killed while it packed its result.
                half_done |= any(path.name != CHECKPOINTS for path in folder.glob(f"{OUTPUT}/*"))
                if delivered or half_done:
                    _discard(folder, delivered=delivered)
            finally:
                os.close(handle)


def _discard(folder: Path, *, delivered: bool = False) -> Path | None:
    """Remove a run's folder except for its result or, if that is not finished, its checkpoints.

    Returns the path of what stays, or None.

    delivered: the result, with the checkpoints in it, was handed over and goes too.
    """
    result, kept = folder / RESULT, folder / OUTPUT / CHECKPOINTS
    for half_written in kept.glob(".*.partial"):
        shutil.rmtree(half_written, ignore_errors=True)
    if not delivered and result.is_file():
        kept = result
    elif not kept.is_dir() or not any(kept.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    _remove_all_but(kept, folder)
    return kept


def _remove_all_but(kept: Path, folder: Path) -> None:
    """Remove everything in `folder` except for `kept`, which is in it or further down."""
    for path in folder.iterdir():
        if path == kept:
            continue
        with contextlib.suppress(OSError):
            if kept.is_relative_to(path):
                _remove_all_but(kept, path)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

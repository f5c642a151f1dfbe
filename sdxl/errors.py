"""Errors that the user can fix.

Each message is one sentence that names the file or input and the remedy. The entry points show it unchanged.
"""

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dataset_and_utils import UserInputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Codes of the system: no space left, over the quota, file too large, read-only."""
_FORBIDDEN = {errno.EACCES, errno.EPERM}
"""Codes of the system: no permission, to read or to write."""

__all__ = [
    "ArchiveError",
    "DatasetError",
    "DownloadError",
    "NotEnoughMemoryError",
    "StorageError",
    "TrainingDivergedError",
    "UploadError",
    "UserInputError",
    "WeightsError",
    "WithheldError",
    "shortened",
    "some_of",
]


def shortened(text: str) -> str:
    """What a user wrote, as messages quote it: text that was pasted by mistake may be megabytes long."""
    return text if len(text) <= 300 else f"{text[:60]}…"


def some_of(names: Iterable[str]) -> str:
    """The first three of `names`, and how many more there are."""
    listed = list(names)
    shown = ", ".join(listed[:3])
    return shown if len(listed) <= 3 else f"{shown} and {len(listed) - 3} more"


class ArchiveError(UserInputError):
    """An archive is unreadable, unsafe, too large or empty."""


class DatasetError(UserInputError):
    """The pictures, captions and token map do not form a usable dataset."""


class DownloadError(UserInputError):
    """A URL or a model on the hub could not be fetched."""


class UploadError(UserInputError):
    """A folder could not be put on the hub."""


class StorageError(UserInputError):
    """A file cannot be written or opened: the disk is full, the folder is read-only, or permission is missing."""

    @classmethod
    def of(cls, error: OSError, path: Path) -> "StorageError":
        """The error for `path`, with the system's own words."""
        if error.errno in _FORBIDDEN:
            return cls(
                f"{path.name} cannot be opened ({error.strerror}): change its permissions, or choose another one."
            )
        return cls(f"{path.name} cannot be written ({error.strerror}): free space, or choose another folder.")

    @classmethod
    def behind(cls, error: BaseException) -> "StorageError | None":
        """The error for what the system refused behind `error`, of any library; None if it was something else."""
        if isinstance(error, OSError) and error.errno in _FULL | _FORBIDDEN:
            return cls.of(error, Path(str(error.filename or "A file")))
        found = re.search(r"\(os error (\d+)\)", str(error))  # libraries in Rust, such as safetensors
        if found is not None and int(found[1]) in _FULL | _FORBIDDEN:
            return cls.of(OSError(int(found[1]), os.strerror(int(found[1]))), Path("A file"))
        return None


class WeightsError(UserInputError):
    """A fine-tune is incomplete, malformed or does not fit the base."""


class NotEnoughMemoryError(UserInputError):
    """The GPU or the machine has too little free memory for a run."""

    @classmethod
    def behind(
        cls, error: BaseException, *, smaller: str = "give less work at once"
    ) -> "NotEnoughMemoryError | None":
        """The error for memory that ran out behind `error`, of any library; None if it was something else.

        smaller: what makes the run smaller, as the remedy in the message.
        """
        told = str(error) if isinstance(error, RuntimeError) else ""
        no_pages = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if "out of memory" in told or "ALLOC_FAILED" in told:
            where = "The GPU"
        elif (
            "allocate memory" in told
            or "not enough memory" in told
            or isinstance(error, MemoryError)
            or no_pages
        ):
            where = "This machine"
        else:
            return None
        return cls(
            f"{where} has too little free memory for this run: {smaller}, or free memory that other programs hold."
        )


class WithheldError(UserInputError):
    """The safety checker withheld every picture of a request."""


class TrainingDivergedError(UserInputError):
    """The loss became NaN or infinite."""

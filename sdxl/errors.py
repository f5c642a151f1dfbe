"""Errors that the user can fix.

Each message is one sentence that names the file or input and the remedy. The entry points show it unchanged.
"""

from dataset_and_utils import UserInputError

__all__ = [
    "ArchiveError",
    "DatasetError",
    "DownloadError",
    "NotEnoughMemoryError",
    "TrainingDivergedError",
    "UserInputError",
    "WeightsError",
    "WithheldError",
]


class ArchiveError(UserInputError):
    """An archive is unreadable, unsafe, too large or empty."""


class DatasetError(UserInputError):
    """The pictures, captions and token map do not form a usable dataset."""


class DownloadError(UserInputError):
    """A URL or a model on the hub could not be fetched."""


class WeightsError(UserInputError):
    """A fine-tune is incomplete, malformed or does not fit the base."""


class NotEnoughMemoryError(UserInputError):
    """The device has too little memory for this training."""


class WithheldError(UserInputError):
    """The safety checker withheld every picture of a request."""


class TrainingDivergedError(UserInputError):
    """The loss became NaN or infinite."""

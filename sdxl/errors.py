"""Errors that are the user's to mend.

Every message is one sentence that names the file or input and the remedy; the doors pass it on as it is.
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
    """An archive cannot be read, is unsafe, too large or empty."""


class DatasetError(UserInputError):
    """Images, captions or the token map do not make a data set."""


class DownloadError(UserInputError):
    """A URL or a hosted model could not be fetched."""


class WeightsError(UserInputError):
    """A fine-tune is incomplete, malformed or does not fit the base model."""


class NotEnoughMemoryError(UserInputError):
    """The device's memory cannot hold what is to be trained."""


class WithheldError(UserInputError):
    """Every picture of a request was judged not safe for work."""


class TrainingDivergedError(UserInputError):
    """The loss is no longer a number."""

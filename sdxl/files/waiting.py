"""Wait for the network so that a cancel or a time limit ends the wait at once.

Knows threads and time; does not know what is waited for.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sdxl.errors import DownloadError

T = TypeVar("T")
_STEP_S = 0.2
"""Seconds between two looks at the clock, and the longest delay of a cancel."""


def wait_for(work: Callable[[threading.Event], T], *, seconds: float, what: str) -> T:
    """The result of `work`, which runs in a thread of its own.

    A blocking call in C, such as one that reads from a socket, delays a cancel until it returns. Waiting for the thread in
    short steps does not.

    work: gets an event that is set when nobody waits any longer; it should then stop and clean up.
    seconds: how long to wait.
    what: what is waited for, for the message.

    Raises:
        DownloadError: it takes longer.
    """
    outcome: dict[str, Any] = {}
    done, abandoned = threading.Event(), threading.Event()

    def run() -> None:
        try:
            outcome["result"] = work(abandoned)
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    deadline = time.monotonic() + seconds
    try:
        threading.Thread(target=run, name="download", daemon=True).start()
        while not done.wait(_STEP_S):
            if time.monotonic() > deadline:
                raise DownloadError(
                    f"{what} took more than {seconds / 60:g} minutes: give a smaller file or a faster server."
                )
    finally:
        abandoned.set()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]

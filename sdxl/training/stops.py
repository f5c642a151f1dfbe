"""What stops a run waits until a step is complete: signals, and the end of the server. One signal asks it to finish early.

Knows signals and Python's handlers of them; does not know what a step does.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from sdxl import shutdown

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HeldStops:
    """Between `hold` and `release` the handlers of Ctrl-C and SIGTERM wait; `release` then calls them.

    Handlers run only in the main thread. Behind a server a run is in another one, and what waits there is the end of the server.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._is_held = False
        self._waiting: tuple[int, FrameType | None] | None = None

    def install(self) -> None:
        """Come before the handlers that there are."""
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                try:
                    signal.signal(number, self._handle)
                except ValueError:  # not the main thread
                    return
                self._previous[number] = handler

    def uninstall(self) -> None:
        """Give the signals back to the handlers that there were. The end of the server does not matter any more."""
        shutdown.end_watch()
        self.hold()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.release()

    def hold(self) -> None:
        """Let what stops the run wait from now on."""
        shutdown.hold()
        self._is_held = True

    def release(self) -> None:
        """Let the run be stopped again, by what waits too."""
        shutdown.release()
        self._is_held = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._previous[waiting[0]](*waiting)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._waiting = (number, frame)
        else:
            self._previous[number](number, frame)


def finish_on_signal() -> Callable[[], bool]:
    """A function that tells whether SIGUSR1 has come since now. Elsewhere than in the main thread it never does."""
    asked = threading.Event()
    try:
        signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    except ValueError:  # not the main thread
        return lambda: False
    return asked.is_set

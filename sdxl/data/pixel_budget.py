"""A limit on how many pixels are in memory at once, shared by threads.

Knows numbers and threads; does not know pictures.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PixelBudget:
    """Lets threads decode pictures at the same time as long as all of them together stay below a limit.

    A thread takes its pixels at once and holds nothing while it waits. A picture above the limit waits until it is alone.
    So some thread can always go on.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        """The limit."""
        self.waiting = 0
        """How many threads wait."""
        self._held: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` fit, and hold them for the block."""
        with self._changed:
            self.waiting += 1
            self._changed.wait_for(lambda: not self._held or sum(self._held) + pixels <= self.pixels)
            self.waiting -= 1
            self._held.append(pixels)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(pixels)
                self._changed.notify_all()

"""Ends the job of a server that was told to stop, by SIGTERM or Ctrl-C: `docker stop` and `cog train` send them.

Cog's server then takes no more connections, but waits for the jobs that clients wait for, which docker allows it for ten
seconds. Its worker is not told. So a thread of the worker looks whether the server still listens.

Knows processes, sockets and threads; does not know what a job does.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl import settings

_POLL_S = 0.2
_LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""


@contextlib.contextmanager
def stops_with_server(cancelled: type[BaseException], *, server: int | None = None) -> Iterator[None]:
    """In this context `cancelled` is raised in this thread, once, if the server stops. Without a server nothing happens.

    server: its process. Default: the one that started this process.
    """
    listener = _listener_of(server or os.getppid()) if settings.behind_server() else None
    if listener is None:
        yield
        return
    watch = _here.watch = _Watch(listener, cancelled)
    watch.start()
    try:
        yield
    finally:
        watch.end()
        _here.watch = None


def hold() -> None:
    """Let a stop of this thread's job wait until `release`."""
    if _here.watch is not None:
        _here.watch.held.acquire()


def release() -> None:
    """End `hold`."""
    if _here.watch is not None:
        _here.watch.held.release()


def end_watch() -> None:
    """From now on this thread's job is not stopped any more, because it ends anyway."""
    if _here.watch is not None:
        _here.watch.end()


@dataclass(frozen=True)
class _Listener:
    """A listening socket of a process: its link in /proc, and what that says as long as the socket is open."""

    link: Path
    target: str

    def is_open(self) -> bool:
        try:
            return str(self.link.readlink()) == self.target
        except OSError:
            return False


class _Watch(threading.Thread):
    """Raises an exception in the thread that made it, once the listener is closed."""

    def __init__(self, listener: _Listener, cancelled: type[BaseException]) -> None:
        super().__init__(name="looks for the server", daemon=True)
        self.held = threading.RLock()
        self._listener, self._cancelled = listener, cancelled
        self._job = threading.get_ident()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_POLL_S):
            if not self._listener.is_open():
                break
        with self.held:
            if not self._over.is_set():
                # The only way into a thread that computes; Cog's own cancel goes this way too.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._job), ctypes.py_object(self._cancelled)
                )

    def end(self) -> None:
        with self.held:
            self._over.set()


class _Here(threading.local):
    watch: _Watch | None = None


_here = _Here()
"""The watch over the job of this thread."""


def _listener_of(process: int) -> _Listener | None:
    """A TCP socket on which `process` listens; None if there is none, or if the system does not tell."""
    with contextlib.suppress(OSError):
        listening = set()
        for table in ("tcp", "tcp6"):
            rows = Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
            columns = [row.split() for row in rows]
            listening |= {f"socket:[{row[9]}]" for row in columns if row[3] == _LISTENS}
        for link in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if (target := str(link.readlink())) in listening:
                    return _Listener(link, target)
    return None

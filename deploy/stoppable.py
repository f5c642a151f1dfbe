"""Work in a thread that ends when its task is cancelled, as a cancelled request ends behind Cog.

Knows threads and asyncio; does not know what the work is.
"""

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Raised inside work whose task was cancelled, at its next bytecode. `finally` clauses run."""


async def run_stoppable(work: Callable[[], T], *, stopping: Callable[[], None] = lambda: None) -> T:
    """The result of `work`, which runs in a thread of its own.

    When the task is cancelled, `Stopped` is raised in the thread. The task ends only when the thread has ended, so the
    next work never meets the rest of this one. A blocking call in C delays the end until it returns.

    stopping: is called when the work begins to stop.

    Raises:
        asyncio.CancelledError: the task was cancelled.
        Exception: what `work` raised.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    # A thread of its own: a late `Stopped` must not hit other work.
    thread = threading.Thread(target=run, name="stoppable", daemon=True)
    thread.start()
    ended = asyncio.ensure_future(asyncio.to_thread(thread.join))
    try:
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        stopping()
        if thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped)
            )
        while not ended.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(ended)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]

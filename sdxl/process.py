"""Set up the process of an entry point: logging, reproducible CPU results, compiler caches and heaps.

Knows the process and the libraries in it; does not know models, files or inputs.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from sdxl.settings import cache_folder

log = logging.getLogger(__name__)

_NOISY = (
    "httpx",
    "httpx2",  # the hub's client since version 2; it would tell signed addresses
    "httpcore",
    "huggingface_hub",
    "urllib3",
    # Without CUDA, torchao warns about kernels that it cannot load. This project uses only its optimizer.
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
"""The options' numbers in glibc's malloc.h."""


def start_logging() -> None:
    """Log to stderr as plain text. Imports nothing, so call it before inputs are read. Safe to call more than once."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


def configure_logging() -> None:
    """Call `start_logging`, and silence diffusers and transformers, whose import takes seconds."""
    start_logging()

    # Import these only after the levels are set: diffusers logs about torchao during its import.
    with _nothing_collected():
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """For the first import of large libraries. They make millions of objects and no garbage, and Python would look through all of
    them again and again, which takes a seventh of the time. Afterwards it looks no more through those that are there."""
    if not gc.isenabled() or "diffusers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def repeat_on_cpu() -> None:
    """Make matrix products on a CPU reproducible to the last bit.

    By default, Intel's MKL chooses kernels by the alignment of the matrices in memory, so one seed could give two results.
    Call this before the first product. Source: MKL's "conditional numerical reproducibility", strict mode.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def share_cores() -> None:
    """Let a thread sleep while it waits for others, instead of keeping its core busy.

    A training step on a CPU has thousands of short operations on several threads. Where other programs use the cores too, a
    waiting thread takes the time of the one that it waits for: a step took ten times as long. On free cores sleeping makes a
    step up to a fifth longer. Call this before torch is imported: OpenMP reads the variable when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def keep_compiled_kernels() -> None:
    """Cache compiled kernels on disk, in `cache_folder` unless torch's own variables name another folder."""
    folder = cache_folder() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def keep_memory_small() -> None:
    """Set glibc up for a server that runs for months; with another C library, do nothing.

    Heaps: by default each thread gets its own, and a heap rarely returns memory to the system. A server draws on many
    threads. Large tensors: by default they come from the heaps too, after the first ones were freed, and leave holes there.
    With their own pages drawing on a CPU takes up to a tenth longer.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)


@functools.cache
def leave_at_once() -> None:
    """Let a server's worker end without taking Python apart, which takes seconds once torch is loaded, and the server waits for it.

    Call this before torch is imported: exit handlers run in reverse order, so those of all libraries run first.
    """
    atexit.register(_leave, [0])


def exit_with(run: Callable[[], int]) -> NoReturn:
    """Run a command line and end the process with its exit code, as fast as `leave_at_once`."""
    code = [1]  # for an error that nobody catches
    atexit.register(_leave, code)
    try:
        code[0] = run()
    except SystemExit as end:
        code[0] = end.code if isinstance(end.code, int) else 1
        raise
    sys.exit(code[0])


def _leave(code: list[int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # nobody may listen any more
            stream.flush()
    os._exit(code[0])


def return_free_memory() -> None:
    """Give the free parts of glibc's heaps back to the system; with another C library, do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)

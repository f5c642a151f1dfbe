"""Set up the process of an entry point: logging, reproducible CPU results, compiler caches and heaps.

Knows the process and the libraries in it; does not know models, files or inputs.
"""

import contextlib
import ctypes
import logging
import os
import sys

from sdxl.settings import cache_folder

log = logging.getLogger(__name__)

_NOISY = (
    "httpx",
    "httpcore",
    "huggingface_hub",
    "urllib3",
    # Without CUDA, torchao warns about kernels that it cannot load. This project uses only its optimizer.
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
_M_ARENA_MAX = -8
"""The option's number in glibc's malloc.h."""


def start_logging() -> None:
    """Log to stderr as plain text. Imports nothing, so call it before inputs are read. Safe to call more than once."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


def configure_logging() -> None:
    """Call `start_logging`, and silence diffusers and transformers, whose import takes seconds."""
    start_logging()

    # Import these only after the levels are set: diffusers logs about torchao during its import.
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def repeat_on_cpu() -> None:
    """Make matrix products on a CPU reproducible to the last bit.

    By default, Intel's MKL chooses kernels by the alignment of the matrices in memory, so one seed could give two results.
    Call this before the first product. Source: MKL's "conditional numerical reproducibility", strict mode.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def keep_compiled_kernels() -> None:
    """Cache compiled kernels on disk, in `cache_folder` unless torch's own variables name another folder."""
    folder = cache_folder() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def share_heaps() -> None:
    """Limit glibc to two heaps for all threads of this process; with another C library, do nothing.

    By default, each thread gets its own heap, and a heap rarely returns memory to the system. A server draws on many
    threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2)

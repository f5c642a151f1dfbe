"""What a program of this project does to its own process: logs, library loggers, heaps, compiler caches, errors.

Knows the process and the libraries in it; does not know models, files or inputs.
"""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sdxl.errors import UserInputError
from sdxl.settings import cache_folder, discard_workspace, new_workspace

log = logging.getLogger(__name__)

_NOISY = (
    "httpx",
    "httpcore",
    "huggingface_hub",
    "urllib3",
    # torchao: without CUDA it reports kernels that it cannot load; only its optimizer is used here.
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
_M_ARENA_MAX = -8
"""The number of this setting in glibc's malloc.h."""


def configure_logging() -> None:
    """Send messages to stderr as plain text, and silence the libraries' own messages; safe to call again."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)

    # After the levels are set: diffusers reports on torchao while it is imported.
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextlib.contextmanager
def workspace_of_run(name: str, *, keep: str | None = None) -> Iterator[Path]:
    """A new workspace folder for one run of an entry point; it is removed if the run fails or is cancelled.

    An error that is not the user's is logged with its traceback, since Cog shows only its message.

    keep: path inside the workspace of what a failed run leaves behind, such as its checkpoints.
    """
    workspace = new_workspace(name)
    try:
        yield workspace
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, UserInputError):
            log.exception("The run %s failed.", name)
        discard_workspace(workspace, keep=None if keep is None else workspace / keep)
        raise


def repeat_on_cpu() -> None:
    """Make equal products of matrices equal to the last bit on a CPU, wherever the matrices lie in memory.

    Intel's MKL otherwise chooses kernels by address, so that one seed could give two results. Must be called before the
    first product. Source: MKL's "conditional numerical reproducibility", strict mode.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def keep_compiled_kernels() -> None:
    """Keep compiled kernels between runs, in `cache_folder` unless torch's own variables name another folder."""
    folder = cache_folder() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def share_heaps() -> None:
    """Make all threads of this process share two heaps, where the C library is glibc.

    glibc gives each thread a heap of its own, which keeps the memory that it once needed. A server draws on many threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2)

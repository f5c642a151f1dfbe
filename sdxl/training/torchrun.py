"""One command line in each process that torchrun starts: `torchrun --nproc-per-node 2 train.py …`, on one host or several.

Knows torchrun's variables; does not know training. Imports torch only if there are several processes, so that a single
one answers `--help` and wrong inputs at once.
"""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path


def process_count() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its host, from 0, which is also the number of its GPU."""
    return int(os.environ["LOCAL_RANK"])


def run_in_each(run: Callable[[list[str]], int]) -> int:
    """Call `run` with the arguments of the command line in every process, and return its exit code.

    Only the first process of all logs, shows progress and leaves files. It is on the host that torchrun counts first.
    """
    if process_count() < 2:
        return run(sys.argv[1:])

    from sdxl.errors import UserInputError
    from sdxl.training import data_parallel

    try:
        data_parallel.join()
    except UserInputError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    first_host = data_parallel.agreed(socket.gethostname())
    if data_parallel.rank() == 0:
        code = run(sys.argv[1:])
    else:
        if local_rank() == 0:
            sys.stderr.write(f"This host helps {first_host}, where the log and the results are.\n")
        code = _run_quietly(run)
    if code == 0:  # a failed process must end at once: leaving waits for the others, which may wait for it
        data_parallel.leave()
    return code


def _run_quietly(run: Callable[[list[str]], int]) -> int:
    """Call `run` with the arguments of the command line, but without a log, progress, or files that stay."""
    from tqdm import tqdm

    logging.disable(logging.WARNING)
    # tqdm reads its own setting, TQDM_DISABLE, only on import.
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment]
    chosen = os.environ.get("SDXL_WORKSPACE") or None
    if chosen is not None:
        Path(chosen).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen) as own:
        os.environ["SDXL_WORKSPACE"] = own
        return run([*sys.argv[1:], "-o", own])

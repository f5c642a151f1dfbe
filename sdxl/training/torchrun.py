"""One command line in each process that torchrun starts: `torchrun --nproc-per-node 2 train.py …`.

Knows torchrun's variables; does not know training. Imports torch only if there are several processes, so that a single
one answers `--help` and wrong inputs at once.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partialmethod


def process_count() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, from 0, which is also the number of its GPU."""
    return int(os.environ["LOCAL_RANK"])


def run_in_each(run: Callable[[list[str]], int]) -> int:
    """Call `run` with the arguments of the command line in every process, and return its exit code.

    Only the first process logs, shows progress and leaves files.
    """
    if process_count() < 2:
        return run(sys.argv[1:])

    from tqdm import tqdm

    from sdxl.training import data_parallel

    data_parallel.join()
    if data_parallel.rank() == 0:
        code = run(sys.argv[1:])
    else:
        logging.disable(logging.WARNING)
        # tqdm reads its own setting, TQDM_DISABLE, only on import.
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment]
        with tempfile.TemporaryDirectory() as own:
            code = run([*sys.argv[1:], "-o", own])
    if code == 0:  # a failed process must end at once: leaving waits for the others, which may wait for it
        data_parallel.leave()
    return code

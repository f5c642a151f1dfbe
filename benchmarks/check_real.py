"""`python -m benchmarks.check_real`: check on a real SDXL what could not be checked without one.

Fetches the base and the helper models, checks every assumption about them, trains a short LoRA on example pictures, and
writes one page of findings with pictures. The page needs no other file, so that it can be attached to a report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

OUTPUT = Path("runs/check-real")
RANDOM = "random"
"""A base of SDXL's size with random weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns 1 if anything differs or could not run, else 0."""
    arguments = parser().parse_args(argv)
    _configure(arguments)

    # Only now: these import torch and diffusers, which read the environment.
    from benchmarks.real import page
    from benchmarks.real.checks import CHECKS, about
    from benchmarks.real.findings import run, without_private_paths
    from benchmarks.real.setup import Setup, named_photo, packaged_photo
    from benchmarks.real.training import train_lora
    from sdxl.errors import UserInputError
    from sdxl.process import configure_logging, keep_compiled_kernels, repeat_on_cpu

    repeat_on_cpu()
    configure_logging()
    keep_compiled_kernels()
    unknown = [name for name in arguments.only if name not in CHECKS]
    if unknown:
        parser().error(f"there is no check {unknown[0]}: choose from {', '.join(CHECKS)}")
    if arguments.base == RANDOM:
        os.environ["SDXL_BASE"] = str(_random_base(arguments.output))
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="work-", dir=arguments.output))
    os.environ.setdefault("SDXL_WORKSPACE", str(folder))
    try:
        photo = named_photo(arguments.photo, arguments.subject) if arguments.photo else packaged_photo()
        setup = Setup(
            photo=photo,
            folder=folder,
            train=train_lora,
            expects_sdxl=False if arguments.base == RANDOM else None,
            steps=arguments.steps,
            checkpoint=arguments.checkpoint,
        )
        told = about(photo.name) | {"date": datetime.now(UTC).date().isoformat()}
        findings = []
        for name in arguments.only or CHECKS:
            sys.stdout.write(f"{name}: ")
            sys.stdout.flush()
            findings.append(run(name, setup))
            sys.stdout.write(f"{findings[-1].status} ({findings[-1].seconds:g} s)\n")
            page.write(
                arguments.output, told, findings
            )  # after each check, so that a stopped run leaves its findings
    except UserInputError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    where = without_private_paths(str(arguments.output / page.PAGE))
    sys.stdout.write(f"{page.summary(findings)}. The page of findings is {where}\n")
    return int(any(finding.status in ("differs", "could not run") for finding in findings))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.check_real", description=__doc__)
    made.add_argument(
        "--base",
        help=f'the base, in the forms of SDXL_BASE, or "{RANDOM}" for random weights of SDXL\'s size. Default: SDXL_BASE, else SDXL 1.0',
    )
    made.add_argument("--steps", type=_positive, help="training steps. Default: 200, or 40 on a miniature")
    made.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="run only these checks. Default: all"
    )
    made.add_argument("--photo", type=Path, help="a photograph of yours. Default: a cat")
    made.add_argument(
        "--subject", default="the subject", help='what is in the middle of your photograph, such as "a dog"'
    )
    made.add_argument(
        "--checkpoint", help="a single-file checkpoint to convert: a path, a URL or a file on the hub"
    )
    made.add_argument("--output", type=Path, default=OUTPUT, help=f"folder of the page. Default: {OUTPUT}")
    made.add_argument("--offline", action="store_true", help="fetch nothing; use what was fetched before")
    return made


def _configure(arguments: argparse.Namespace) -> None:
    """Set the environment variables that the arguments stand for."""
    if arguments.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.base and arguments.base != RANDOM:
        os.environ["SDXL_BASE"] = arguments.base
    refiner = Path(os.environ.get("SDXL_BASE", "") + "-refiner")
    if os.environ.get("SDXL_BASE") and refiner.is_dir():
        os.environ.setdefault("SDXL_REFINER", str(refiner))


def _random_base(output: Path) -> Path:
    from benchmarks import full_size

    return full_size.save_pipeline(output / "random-base")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())

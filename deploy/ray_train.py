"""Train one fine-tune for each archive of a folder, on as many GPUs as Ray has. A second start goes on where the first ended.

    python -m deploy.ray_train pictures/ -i token_map=TOK:2 -o out/

`pictures/cat.zip` becomes `out/cat/trained_model.tar`. Each training is a task of Ray with one GPU, and runs as `train.py` does on
the command line. Knows Ray and folders; does not know how a training works.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from sdxl import settings
from sdxl.command_line import add_input_option, deliver, parse_inputs, run_into
from sdxl.declared_inputs import declared_inputs
from sdxl.errors import UserInputError
from sdxl.workspace import RESULT
from train import checked_inputs, train, train_with_report

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
LOG = "train.log"
"""What a training says, beside its result."""
OURS = ("input_images", "input_data_tar_or_zip", "resume", "upload_url", "push_to")
"""Inputs that differ between the trainings."""
RETRIES = 2
"""How often a training goes on whose process or machine died."""
STOP_S = 60
"""Seconds that stopped trainings have to save their states."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0 if all are finished, 1 if some failed, 2 for wrong inputs, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "pictures", type=Path, help="a folder with an archive, or a folder of pictures, for each subject"
    )
    add_input_option(parser, "an input of train.py, for all of them")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=1, help="of each training; 0: the CPU")
    args = parser.parse_args(argv)
    try:
        subjects = subjects_in(args.pictures)
        inputs_for(next(iter(subjects.values())), args.input)  # the other inputs are the same for all
    except UserInputError as error:
        print(f"{error} See --help.", file=sys.stderr)
        return 2
    return run_into(args.output, lambda: train_all(subjects, args.output, args.input, gpus=args.gpus))


def subjects_in(folder: Path) -> dict[str, Path]:
    """Name → archive or folder of pictures.

    Raises:
        UserInputError: there is none, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        suffix = "" if path.is_dir() else next((end for end in ARCHIVES if path.name.endswith(end)), None)
        if suffix is None or path.name.startswith("."):
            continue
        name = path.name.removesuffix(suffix)
        if name in found:
            raise UserInputError(f"{path.name} and {found[name].name} have one name: rename one of them.")
        found[name] = path.absolute()
    if not found:
        raise UserInputError(f"{folder} has no archives: give a folder with a zip or tar for each subject.")
    return found


def inputs_for(archive: Path, items: Sequence[str]) -> dict[str, Any]:
    """The inputs of the training on `archive`.

    items: inputs of all trainings, such as "token_map=TOK:2".

    Raises:
        UserInputError: an input is wrong, contradicts another one, or differs between the trainings.
    """
    for item in items:
        if (name := item.partition("=")[0]) in OURS:
            raise UserInputError(f"{name} cannot be the same for many trainings: leave it out.")
    given = parse_inputs([f"input_images={archive}", "resume=auto", *items], declared_inputs(train))
    checked_inputs(given)  # here, because each training would tell it anew
    return given


def train_all(subjects: Mapping[str, Path], output: Path, items: Sequence[str], *, gpus: int) -> None:
    """Train the subjects that have no result in `output` yet.

    Raises:
        UserInputError: some failed. The others are finished all the same.
        KeyboardInterrupt: it was stopped. The trainings that ran have saved their states.
    """
    output = output.absolute()
    left = {name: archive for name, archive in subjects.items() if not (output / name / RESULT).is_file()}
    if done := len(subjects) - len(left):
        print(f"{done} of {len(subjects)} are finished already.", flush=True)
    if not left:
        return
    ours = {name: value for name in settings.VARIABLES if (value := settings.variable(name))}
    stops = signal.getsignal(signal.SIGTERM)
    with ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": ours}):
        signal.signal(signal.SIGTERM, stops)  # Ray's own would kill the trainings
        if gpus and not ray.cluster_resources().get("GPU"):
            print("Ray has no GPU yet, so the trainings wait for one. --gpus 0 takes the CPU.", flush=True)
        # A process of its own for each: it gives all memory back.
        task = ray.remote(num_gpus=gpus, num_cpus=1, max_calls=1, max_retries=RETRIES)(train_one)
        running = {task.remote(left[name], output / name, list(items), Path.cwd()): name for name in left}
        failed = _ended(running, total=len(left))
    if failed:
        raise UserInputError(
            f"{failed} of {len(subjects)} failed, as told above: {LOG} of each has more. The next start tries them again."
        )


def _ended(running: dict[Any, str], *, total: int) -> int:
    """Tell how each training ended, in the order of their ends; how many failed."""
    failed = 0
    try:
        while running:
            [task], _ = ray.wait(list(running))
            name = running.pop(task)
            try:
                error = ray.get(task)
            except RayError as lost:
                error = f"Ray lost its process, or could not start one ({type(lost).__name__})."
            failed += error is not None
            told = "finished" if error is None else f"failed. {error}"
            print(f"[{total - len(running)}/{total}] {name}: {told}", flush=True)
    except KeyboardInterrupt:
        for task in running:
            ray.cancel(task)
        ray.wait(list(running), num_returns=len(running), timeout=STOP_S)
        raise
    return failed


def train_one(archive: Path, folder: Path, items: list[str], start: Path) -> str | None:
    """A task of Ray: train on `archive`, and put the result into `folder`. Returns why it failed; None if it did not.

    If the process dies, Ray calls it again, and `resume` lets it go on from its last state.

    start: the folder that relative paths begin in.
    """
    os.chdir(start)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SDXL_WORKSPACE", str(folder))
    with (folder / LOG).open("a") as log:
        for stream in (sys.stdout, sys.stderr):  # of this process, which has no other task
            os.dup2(log.fileno(), stream.fileno())
    try:
        deliver(train_with_report(**inputs_for(archive, items)), folder)
    except UserInputError as error:
        print(error)
        return str(error)
    except Exception:
        traceback.print_exc()
        return f"An error in this program: {folder / LOG} has more."
    return None


if __name__ == "__main__":
    sys.exit(main())

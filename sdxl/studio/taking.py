"""Take a fine-tune away: `export.py` writes it for another program, or puts it on the hub.

Knows forms and where files go; does not know what is in them.
"""

import re
import shutil
import sys
import zipfile
from pathlib import Path

from sdxl.errors import UserInputError
from sdxl.files.archives import atomic_path
from sdxl.studio import doors
from sdxl.studio.trainings import Training

FORMS = {
    "ComfyUI, AUTOMATIC1111, Forge, InvokeAI": "kohya",
    "OneTrainer": "onetrainer",
    "diffusers (Python)": "diffusers",
    "One whole checkpoint (about 7 GB)": "single_file",
}
"""What people choose → a form of `export.py`."""


def file_for(training: Training, form: str) -> Path:
    """The fine-tune in the form `form`, as one file: a zip, unless it is a single file.

    Raises:
        UserInputError: there is none yet, or the entry point says why not.
    """
    _require(training)
    folder = training.folder / "exported" / form
    made = folder / "made"
    shutil.rmtree(folder, ignore_errors=True)
    doors.run(_export(training, form, made), folder)
    files = [path for path in made.rglob("*") if path.is_file()]
    if len(files) == 1:
        return files[0]
    target = folder / f"{training.resolved['token_map'].split(':')[0]}-{form}.zip"
    with atomic_path(target) as partial, zipfile.ZipFile(partial, "w") as archive:  # weights do not compress
        for path in sorted(files):
            archive.write(path, path.relative_to(made))
    return target


def push(training: Training, repository: str, token: str, *, public: bool) -> str:
    """Put the fine-tune on the Hugging Face hub; return a sentence with the address. `token` is kept nowhere.

    Raises:
        UserInputError: there is none yet, or the entry point says why not.
    """
    _require(training)
    folder = training.folder / "exported" / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    more = ["--push", repository.strip(), *(["--public"] if public else [])]
    keys = {"HF_TOKEN": token.strip()} if token.strip() else {}
    told = doors.run([*_export(training, "diffusers", folder / "made"), *more], folder, **keys)
    found = re.search(r"Uploaded: (\S+)", told)
    return f"It is on the hub: {found[1]}" if found else "It is on the hub."


def _export(training: Training, form: str, output: Path) -> list[str]:
    door = str(doors.HERE / "export.py")
    return [sys.executable, door, str(training.result), "--to", form, "-o", str(output)]


def _require(training: Training) -> None:
    if not training.result.is_file():
        raise UserInputError("This training has no result yet: wait until it has finished.")

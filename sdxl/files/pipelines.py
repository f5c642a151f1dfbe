"""Turn the name of a pipeline in diffusers' layout into a local folder, with the files that are needed of it.

Knows diffusers' layout; does not know how files are fetched or loaded.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdxl.errors import DownloadError
from sdxl.files.hub import fetch_model
from sdxl.files.part_files import present, variants
from sdxl.settings import SDXL

SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
"""The pinned revision of the default base, so that a new commit on the hub cannot change results."""
WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PIPELINE = (*WITH_WEIGHTS, "tokenizer", "tokenizer_2", "scheduler")
"""The parts of an SDXL that have weights, and all that are needed. Repositories have more, such as `vae_1_0`."""
_CONFIGURATION = (".json", ".txt")


def local_folder(
    name: str,
    *,
    setting: str = "SDXL_BASE",
    parts: Sequence[str] = PIPELINE,
    weights: Sequence[str] = WITH_WEIGHTS,
) -> Path:
    """Return the folder of the pipeline `name` in diffusers' layout, and fetch it from the hub if necessary.

    Fetches only configuration files and one variant of the weights of each part: fp16 if the part has it. Uses the hub's
    cache without network if it is complete; `HF_HOME` moves that cache.

    setting: the environment variable or input that errors name.
    parts: the subfolders to fetch.
    weights: those of them that must have weights; of the others only configuration files are fetched.

    Raises:
        DownloadError: the folder is not a pipeline or not complete, the hub cannot be reached, or it does not have `name`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise DownloadError(
                f"{setting}={name} has no model_index.json: give a folder in diffusers' layout."
            )
        for part in weights:
            if present(folder / part) is None:
                raise DownloadError(
                    f"{setting}={name} is incomplete, because {part} lacks safetensors weights or some of their shards: "
                    "download or copy it again."
                )
        return folder

    def wanted(files: Iterable[str]) -> list[str]:
        chosen = ["model_index.json"]
        for part in parts:
            inside = [file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")]
            names = [file for file in inside if file.endswith(_CONFIGURATION) and ".index." not in file]
            if part in weights:
                names += next((one.names for one in variants(inside)), [])
            chosen += [f"{part}/{file}" for file in names]
        return chosen

    def is_complete(folder: Path) -> bool:
        return _has_configuration(folder, parts) and all(present(folder / part) for part in weights)

    remedy = f"set {setting} to a local folder in diffusers' layout, such as those in base_models"
    revision = SDXL_REVISION if name == SDXL else None
    return fetch_model(name, revision, wanted, is_complete, setting=setting, remedy=remedy)


def part_folder(name: str, part: str, *, setting: str) -> Path:
    """Return the folder of one part in diffusers' layout: `name` itself, or its subfolder `part` if it is a pipeline.

    name: a folder or a hub repository, which is fetched if necessary.

    Raises:
        DownloadError: there is no such part, or the hub cannot be reached.
    """

    def found(folder: Path) -> Path | None:
        folders = (folder, folder / part)
        return next((one for one in folders if (one / "config.json").is_file() and present(one)), None)

    def wanted(files: Iterable[str]) -> list[str]:
        listed = list(files)
        prefix = f"{part}/" if f"{part}/config.json" in listed else ""
        inside = [file.removeprefix(prefix) for file in listed if file.startswith(prefix)]
        names = next((one.names for one in variants(inside)), [])
        return [prefix + file for file in ("config.json", *names)]

    folder = Path(name).expanduser()
    if not folder.is_dir():
        remedy = f"set {setting} to a local folder in diffusers' layout"
        folder = fetch_model(
            name, None, wanted, lambda folder: found(folder) is not None, setting=setting, remedy=remedy
        )
    if (inside := found(folder)) is None:
        raise DownloadError(
            f"{setting}={name} has no config.json with safetensors weights: give a folder in diffusers' layout."
        )
    return inside


def _has_configuration(folder: Path, parts: Sequence[str]) -> bool:
    """Whether each of `parts` that the pipeline in `folder` has, has a configuration."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        existing = [part for part in parts if (index.get(part) or [None])[0] is not None]
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError):
        return False
    return all(
        any((folder / part).glob("*.json"))
        and ((folder / part / "merges.txt").is_file() or not (folder / part / "vocab.json").is_file())
        for part in existing
    )

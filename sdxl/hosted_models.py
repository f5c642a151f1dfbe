"""Model name → local folder. The only place that downloads models."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sdxl.errors import DownloadError

log = logging.getLogger(__name__)

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
"""The revision of the default base that is fetched: a moved branch must not change results."""


REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"


def refiner_name() -> str:
    """The refiner that `SDXL_REFINER` names (a folder in diffusers' layout or a hub name); SDXL 1.0's by default."""
    return os.environ.get("SDXL_REFINER") or REFINER


def base_name() -> str:
    """The base model that `SDXL_BASE` names (a folder in diffusers' layout or a hub name); SDXL 1.0 by default."""
    return os.environ.get("SDXL_BASE") or SDXL


def local_folder(name: str, *, setting: str = "SDXL_BASE", parts: Sequence[str] = ()) -> Path:
    """Return the folder of the pipeline `name`, in diffusers' layout, fetching it from the hub when need be.

    Of a hub repository only the half-precision safetensors weights and the configuration files are fetched, and only
    those of `parts` (subfolders such as "unet") where any are given. Files already in the hub's cache are used without
    network; `HF_HOME` moves that cache. `setting` is the environment variable that errors name.

    Raises:
        DownloadError: the folder is no pipeline, or the hub cannot be reached or does not have `name`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise DownloadError(
                f"{setting}={name} holds no model_index.json: name a folder in diffusers' layout."
            )
        return folder
    kinds: list[str] = ["*.json", "*.txt", "*.fp16.safetensors"]
    patterns = (
        [f"{part}/{kind}" for part in parts for kind in kinds] + ["model_index.json"] if parts else kinds
    )
    revision = SDXL_REVISION if name == SDXL else None
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        log.info("Fetching %s from the hub (gigabytes; once)", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DownloadError(
            f"{setting}={name} is neither an existing folder nor a model on the hub: check the spelling."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"The model {name} could not be fetched from the hub ({type(error).__name__}): connect this machine, "
            f"or set {setting} to a local folder in diffusers' layout."
        ) from error


def fine_tune_folder(name: str) -> Path:
    """The folder of the fine-tune in the hub's repository `name`: its safetensors, embeddings and JSON files.

    Raises:
        DownloadError: the hub cannot be reached or does not have `name`.
    """
    wanted = {"allow_patterns": ["*.safetensors", "*.pti", "*.json"], "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, **wanted))  # type: ignore[arg-type]
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DownloadError(
            f"{name} is neither an existing path nor a repository on the hub: check the spelling."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"{name} is no existing path, and could not be fetched from the hub ({type(error).__name__}): check the "
            "spelling and the connection."
        ) from error

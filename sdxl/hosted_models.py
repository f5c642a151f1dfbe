"""Model name → local folder. The only place that downloads models."""

import logging
import os
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


def base_name() -> str:
    """The base model that `SDXL_BASE` names (a folder in diffusers' layout or a hub name); SDXL 1.0 by default."""
    return os.environ.get("SDXL_BASE") or SDXL


def local_folder(name: str) -> Path:
    """Return the folder of the pipeline `name`, in diffusers' layout, fetching it from the hub when need be.

    Of a hub repository only the half-precision safetensors weights and the configuration files are fetched. Files
    already in the hub's cache are used without network; `HF_HOME` moves that cache.

    Raises:
        DownloadError: the folder is no pipeline, or the hub cannot be reached or does not have `name`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise DownloadError(
                f"SDXL_BASE={name} holds no model_index.json: name a folder in diffusers' layout."
            )
        return folder
    patterns = ["*.json", "*.txt", "*.fp16.safetensors"]
    revision = SDXL_REVISION if name == SDXL else None
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        log.info("Fetching %s from the hub (about 7 GB for SDXL 1.0; once)", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DownloadError(
            f"SDXL_BASE={name} is neither an existing folder nor a model on the hub: check the spelling."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"The model {name} could not be fetched from the hub ({type(error).__name__}): connect this machine, "
            "or set SDXL_BASE to a local folder in diffusers' layout, such as base_models/tiny-sdxl."
        ) from error

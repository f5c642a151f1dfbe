"""Model name → local folder. The only place that downloads models."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sdxl import settings
from sdxl.errors import DownloadError
from sdxl.settings import SDXL

log = logging.getLogger(__name__)

SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
"""The revision of the default base that is fetched: a moved branch must not change results."""
LARGEST_FINE_TUNE = 12 << 30
"""Bytes that are fetched of a hub's repository: SDXL's UNet has 10.3 GB in fp32. What is fetched stays in the hub's cache."""


@dataclass(frozen=True, kw_only=True)
class Helper:
    """A model that helps to prepare pictures."""

    purpose: str
    """What it does, as in "the captioner"."""
    setting: str
    """The environment variable that names another hub model, or a folder in transformers' layout."""
    hub_name: str
    """The model that is used without that setting."""
    revision: str | None = None
    """The state of it that is fetched; None, the newest, where none is known to work."""


CAPTIONER = Helper(
    purpose="the captioner", setting="SDXL_CAPTIONER", hub_name="Salesforce/blip-image-captioning-large"
)
SEGMENTER = Helper(purpose="the segmenter", setting="SDXL_SEGMENTER", hub_name="CIDAS/clipseg-rd64-refined")
UPSCALER = Helper(
    purpose="the upscaler",
    setting="SDXL_UPSCALER",
    hub_name="caidas/swin2SR-realworld-sr-x4-64-bsrgan-psnr",
)


def local_folder(name: str, *, setting: str = "SDXL_BASE", parts: Sequence[str] = ()) -> Path:
    """Return the folder of the pipeline `name`, in diffusers' layout, fetching it from the hub when need be.

    Of a hub repository only the half-precision safetensors weights and the configuration files are fetched, and only
    those of `parts` (subfolders such as "unet", that of the weights first) where any are given. Files already in the hub's cache are used without
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
    kinds: list[str] = ["*.json", "*.txt", "*.fp16*.safetensors"]
    patterns = (
        [f"{part}/{kind}" for part in parts for kind in kinds] + ["model_index.json"] if parts else kinds
    )
    revision = SDXL_REVISION if name == SDXL else None
    remedy = f"set {setting} to a local folder in diffusers' layout, such as those in base_models"
    weighty = parts[:1] or ("unet", "vae", "text_encoder", "text_encoder_2")
    needed = [f"{part}/*.safetensors" for part in weighty]
    return _fetched(name, revision, patterns, needed, setting=setting, remedy=remedy)


def helper_folder(helper: Helper) -> Path:
    """Return the folder of a helper model in transformers' layout: safetensors weights and configuration files only.

    It is the folder or hub name that the helper's setting gives, with an optional `@revision` after a hub name, else
    the helper's default. Files already in the hub's cache are used without network.

    Raises:
        DownloadError: the folder is no model, the hub cannot be reached, or it has no safetensors weights of it.
    """
    name = settings.variable(helper.setting) or helper.hub_name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        name, _, revision = name.partition("@")
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        remedy = f"set {helper.setting} to a local folder in transformers' layout"
        known = helper.revision if name == helper.hub_name else None
        needed = ["config.json", "*.safetensors"]
        folder = _fetched(name, revision or known, patterns, needed, setting=helper.setting, remedy=remedy)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise DownloadError(
            f"{helper.setting}={name} holds no config.json with safetensors weights: name a model in transformers' layout."
        )
    return folder


def _fetched(
    name: str, revision: str | None, patterns: list[str], needed: list[str], *, setting: str, remedy: str
) -> Path:
    """The folder of the hub's model `name` with the files of `patterns`: from the cache if it has files of all that is
    `needed`, which an interrupted download does not, else from the network."""

    def is_whole(folder: Path) -> bool:
        return all(any(folder.glob(pattern)) for pattern in needed)

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        cached = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        if is_whole(cached):
            return cached
    log.info("Fetching %s from the hub (once)", name)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DownloadError(
            f"{setting}={name} is neither an existing folder nor a model on the hub: check the spelling."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"The model {name} could not be fetched from the hub ({type(error).__name__}): connect this machine, "
            f"or {remedy}."
        ) from error
    if not is_whole(folder):  # without network the hub's library gives what there is
        raise DownloadError(
            f"The model {name} is not whole in the hub's cache, or has no safetensors weights: connect this machine, "
            f"or {remedy}."
        )
    return folder


def _refuse_large(name: str, wanted: Mapping[str, Any]) -> None:
    with contextlib.suppress(DryRunError):  # out of reach: fetching says so
        files: Any = snapshot_download(name, **wanted, dry_run=True)
        size = sum(file.file_size or 0 for file in files)
        if size > LARGEST_FINE_TUNE:
            raise DownloadError(
                f"{name} on the hub holds {size / 2**30:.0f} GiB of weights, more than a fine-tune: name the repository of "
                "a LoRA or of a UNet alone."
            )


def fine_tune_folder(name: str) -> Path:
    """The folder of the fine-tune in the hub's repository `name`: its safetensors, embeddings and JSON files.

    Raises:
        DownloadError: the hub cannot be reached or does not have `name`, or it has more than `LARGEST_FINE_TUNE`.
    """
    wanted = {"allow_patterns": ["*.safetensors", "*.pti", "*.json"], "ignore_patterns": ["*/*"]}
    try:
        try:
            snapshot_download(name, **wanted, local_files_only=True)  # type: ignore[call-overload]
        except LocalEntryNotFoundError:  # asked for the first time
            _refuse_large(name, wanted)
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

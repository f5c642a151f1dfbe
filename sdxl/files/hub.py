"""Turn the name of a model into a local folder.

The only module that downloads models; does not know how to load them.
"""

import contextlib
import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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
from sdxl.files.waiting import wait_for
from sdxl.settings import SDXL

log = logging.getLogger(__name__)

SDXL_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
"""The pinned revision of the default base, so that a new commit on the hub cannot change results."""
LARGEST_FINE_TUNE = 12 << 30
"""Maximum bytes of a fine-tune's repository, since downloads stay in the hub's cache. SDXL's UNet has 10.3 GB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Helper:
    """A model that helps to prepare pictures."""

    purpose: str
    """Its role as a noun, such as "the captioner"."""
    setting: str
    """The environment variable that names another hub model, or a folder in transformers' layout."""
    hub_name: str
    """The default model."""
    revision: str | None = None
    """The default model's pinned revision; None fetches the newest."""


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
    """Return the folder of the pipeline `name` in diffusers' layout, and fetch it from the hub if necessary.

    Fetches only half-precision safetensors weights and configuration files. Uses the hub's cache without network if it is
    complete; `HF_HOME` moves that cache.

    setting: the environment variable that errors name.
    parts: the subfolders to fetch, such as "unet", the one with the weights first; by default all.

    Raises:
        DownloadError: the folder is not a pipeline, the hub cannot be reached, or it does not have `name`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise DownloadError(
                f"{setting}={name} has no model_index.json: give a folder in diffusers' layout."
            )
        return folder
    kinds: list[str] = ["*.json", "*.txt", "*.fp16*.safetensors"]
    patterns = (
        [f"{part}/{kind}" for part in parts for kind in kinds] + ["model_index.json"] if parts else kinds
    )
    revision = SDXL_REVISION if name == SDXL else None
    remedy = f"set {setting} to a local folder in diffusers' layout, such as those in base_models"
    parts_with_weights = parts[:1] or ("unet", "vae", "text_encoder", "text_encoder_2")
    required = [f"{part}/*.safetensors" for part in parts_with_weights]
    return _fetch_model(name, revision, patterns, required, setting=setting, remedy=remedy)


def helper_folder(helper: Helper) -> Path:
    """Return the folder of a helper model in transformers' layout, and fetch it from the hub if necessary.

    The helper's setting names a folder or a hub model, with an optional `@revision`; without it, use the default model.
    Fetches only safetensors weights and configuration files. Uses the hub's cache without network if it is complete.

    Raises:
        DownloadError: the folder is not a model, the hub cannot be reached, or it has no safetensors weights.
    """
    name = settings.variable(helper.setting) or helper.hub_name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        name, _, revision = name.partition("@")
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        remedy = f"set {helper.setting} to a local folder in transformers' layout"
        pinned = helper.revision if name == helper.hub_name else None
        required = ["config.json", "*.safetensors"]
        folder = _fetch_model(
            name, revision or pinned, patterns, required, setting=helper.setting, remedy=remedy
        )
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise DownloadError(
            f"{helper.setting}={name} has no config.json with safetensors weights: give a model in transformers' layout."
        )
    return folder


def _fetch_model(
    name: str, revision: str | None, patterns: list[str], required: list[str], *, setting: str, remedy: str
) -> Path:
    """Return the folder of the hub model `name` with the files that match `patterns`.

    Uses the cache if each pattern of `required` matches a file there. After an interrupted download, some match none.
    """

    def is_complete(folder: Path) -> bool:
        return all(any(folder.glob(pattern)) for pattern in required)

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        cached = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        if is_complete(cached):
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
    if not is_complete(
        folder
    ):  # without network, the hub's library returns an incomplete folder without an error
        raise DownloadError(
            f"The model {name} is incomplete in the hub's cache, or has no safetensors weights: connect this machine, "
            f"or {remedy}."
        )
    return folder


def _check_download_size(name: str, filters: Mapping[str, Any]) -> None:
    """Raise `DownloadError` if the files of repository `name` that pass `filters` exceed `LARGEST_FINE_TUNE`."""
    with contextlib.suppress(DryRunError):  # no network: the download itself then reports that
        files: Any = snapshot_download(name, **filters, dry_run=True)
        size = sum(file.file_size or 0 for file in files)
        if size > LARGEST_FINE_TUNE:
            raise DownloadError(
                f"{name} on the hub holds {size / 2**30:.0f} GiB of weights, more than a fine-tune: give the repository of "
                "a single LoRA or UNet."
            )


def fine_tune_folder(name: str) -> Path:
    """Return the folder of the fine-tune in the hub repository `name`, with its safetensors, embeddings and JSON files.

    Raises:
        DownloadError: the hub cannot be reached, does not have `name`, or has more than `LARGEST_FINE_TUNE` there.
    """
    filters = {"allow_patterns": ["*.safetensors", "*.pti", "*.json"], "ignore_patterns": ["*/*"]}
    return _fetch_fine_tune(name, filters)


def fine_tune_file(source: str) -> Path:
    """Return the file of a fine-tune in a hub repository: `source` is `owner/repository/path/to/file`.

    Also fetches peft's configuration from the file's folder, if there is one.

    Raises:
        DownloadError: like `fine_tune_folder`; or the repository has no such file.
    """
    owner, repository, file = source.split("/", 2)
    name = f"{owner}/{repository}"
    wanted = [file, str(PurePosixPath(file).with_name("adapter_config.json"))]
    folder = _fetch_fine_tune(name, {"allow_patterns": [glob.escape(path) for path in wanted]}, file)
    if not (folder / file).is_file():
        raise DownloadError(
            f"{name} on the hub has no file {file}: copy its path from the repository's page."
        )
    return folder / file


def _fetch_fine_tune(name: str, filters: dict[str, Any], file: str = "") -> Path:
    """Return the folder of the repository `name` with the files that pass `filters`, among them `file`."""
    try:
        try:
            cached = Path(snapshot_download(name, **filters, local_files_only=True))
            is_new = not (cached / file).exists()
        except LocalEntryNotFoundError:
            is_new = True
        if is_new:
            _check_download_size(name, filters)
        folder = wait_for(
            lambda abandoned: snapshot_download(name, **filters),
            seconds=settings.download_seconds(),
            what=f"The download of {name}",
        )
        return Path(folder)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DownloadError(
            f"{name} is neither an existing path nor a repository on the hub: check the spelling."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"{name} is not an existing path and could not be fetched from the hub ({type(error).__name__}): check the "
            "spelling and the connection."
        ) from error

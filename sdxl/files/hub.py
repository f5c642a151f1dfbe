"""Fetch models, files and fine-tunes from the Hugging Face hub.

The only module that downloads from the hub; does not know how to load models, or what belongs to an SDXL.
"""

import glob
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sdxl import settings
from sdxl.errors import DownloadError
from sdxl.files.part_files import present, variants
from sdxl.files.waiting import wait_for

log = logging.getLogger(__name__)

LARGEST_BASE = 24 << 30
"""Maximum bytes that are fetched of a base. SDXL has 13.9 GB in fp32."""
LARGEST_FINE_TUNE = 12 << 30
"""Maximum bytes of a fine-tune's repository, since downloads stay in the hub's cache. SDXL's UNet has 10.3 GB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Helper:
    """A model that looks at pictures."""

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
DINO = Helper(purpose="the model of likeness", setting="SDXL_DINO", hub_name="facebook/dinov2-small")
CLIP = Helper(
    purpose="the model of pictures and texts",
    setting="SDXL_CLIP",
    hub_name="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",  # OpenAI's of this size has no safetensors
)


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
        remedy = f"set {helper.setting} to a local folder in transformers' layout"
        pinned = helper.revision if name == helper.hub_name else None

        folder = fetch_model(
            name, revision or pinned, _files_of_helper, _is_helper, setting=helper.setting, remedy=remedy
        )
    if not _is_helper(folder):
        raise DownloadError(
            f"{helper.setting}={name} has no config.json with safetensors weights: give a model in transformers' layout."
        )
    return folder


def is_here(helper: Helper) -> bool:
    """Whether a helper model is in a folder or in the hub's cache, so that `helper_folder` fetches nothing."""
    name = settings.variable(helper.setting) or helper.hub_name
    folder: Path | None = Path(name).expanduser()
    if not folder.is_dir():
        name, _, revision = name.partition("@")
        folder = _cached(name, revision or (helper.revision if name == helper.hub_name else None))
    return folder is not None and _is_helper(folder)


def _files_of_helper(files: Iterable[str]) -> list[str]:
    """What transformers reads of a repository: some have the same weights for other programs too."""
    names = list(files)
    weights = {name for found in variants(names) for name in found.names}
    return [name for name in names if name.endswith((".json", ".txt", ".model")) or name in weights]


def _is_helper(folder: Path) -> bool:
    return (folder / "config.json").is_file() and present(folder) is not None


def fetch_model(
    name: str,
    revision: str | None,
    wanted: Callable[[Iterable[str]], list[str]],
    is_complete: Callable[[Path], bool],
    *,
    setting: str,
    remedy: str,
) -> Path:
    """Return the folder of the hub model `name` with the files that `wanted` chooses from all of them.

    Uses the cache if it `is_complete`; after an interrupted download it is not.
    """
    cached = _cached(name, revision)
    if cached is not None and is_complete(cached):
        return cached
    log.info("Fetching %s from the hub (once)", name)
    try:
        listed: Any = snapshot_download(name, revision=revision, dry_run=True)
        files = {file.filename: file.file_size or 0 for file in listed}
        chosen = wanted(files)
        _check_size(name, sum(files.get(file, 0) for file in chosen), LARGEST_BASE, "a base")
        folder = wait_for(
            lambda abandoned: snapshot_download(
                name, revision=revision, allow_patterns=[glob.escape(file) for file in chosen]
            ),
            seconds=settings.download_seconds(),
            what=f"The download of {name}",
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if cached is not None and not isinstance(_cause(error), RepositoryNotFoundError):
            raise DownloadError(
                f"The model {name} is incomplete in the hub's cache: connect this machine, or {remedy}."
            ) from error
        raise _explained(error, name, what=f"{setting}={name}", remedy=f", or {remedy}") from error
    if not is_complete(Path(folder)):
        raise DownloadError(
            f"The model {name} is incomplete on the hub, or has no safetensors weights: {remedy}."
        )
    return Path(folder)


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of the hub model `name` in the hub's cache, if there is one. Files of it may be missing."""
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*"], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _cause(error: Exception) -> BaseException:
    """What lies behind an error of the hub's library, which may hide why it cannot reach a file."""
    hides = isinstance(error, DryRunError | LocalEntryNotFoundError)
    return (error.__cause__ or error) if hides else error


def _explained(error: Exception, name: str, *, what: str, remedy: str = "") -> DownloadError:
    """The error of a download from the repository `name` as a sentence for users.

    what: how the user named it.
    remedy: what else helps if the hub cannot be reached.
    """
    cause = _cause(error)
    if isinstance(cause, GatedRepoError):
        return DownloadError(
            f"The model {name} is gated: accept its licence at https://huggingface.co/{name}, and set HF_TOKEN to an "
            "access token of your account."
        )
    if isinstance(cause, RepositoryNotFoundError | HFValidationError):
        return DownloadError(
            f"{what} is neither an existing path nor a repository on the hub: check the spelling, or set HF_TOKEN if it is "
            "private."
        )
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        return DownloadError(
            f"The hub refuses {name} (HTTP {cause.response.status_code}): check HF_TOKEN, and accept the licence at "
            f"https://huggingface.co/{name} if there is one."
        )
    return DownloadError(
        f"{what} could not be fetched from the hub ({type(cause).__name__}): check the spelling and the connection{remedy}."
    )


def _check_size(name: str, size: int, limit: int, kind: str) -> None:
    if size > limit:
        raise DownloadError(
            f"{name} on the hub holds {size / 2**30:.0f} GiB of weights, more than {kind}: give the repository of "
            "a single model."
        )


def single_file(source: str, *, setting: str) -> Path:
    """Return the file `owner/repository/path` of the hub, and fetch it if necessary.

    setting: the environment variable or input that errors name.

    Raises:
        DownloadError: the hub cannot be reached, does not have the file, or it is larger than `LARGEST_BASE`.
    """
    owner, repository, path = source.split("/", 2)
    name = f"{owner}/{repository}"
    try:
        return Path(hf_hub_download(name, path, local_files_only=True))
    except LocalEntryNotFoundError:
        log.info("Fetching %s from the hub (once)", source)
    except HFValidationError as error:
        raise _explained(error, name, what=f"{setting}={source}") from error
    try:
        _check_size(source, hf_hub_download(name, path, dry_run=True).file_size or 0, LARGEST_BASE, "a base")
        return Path(
            wait_for(
                lambda abandoned: hf_hub_download(name, path),
                seconds=settings.download_seconds(),
                what=f"The download of {source}",
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise DownloadError(
                f"{name} on the hub has no file {path}: check the spelling, with upper and lower case."
            ) from error
        raise _explained(error, name, what=f"{setting}={source}") from error


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
            files: Any = snapshot_download(name, **filters, dry_run=True)
            _check_size(name, sum(one.file_size or 0 for one in files), LARGEST_FINE_TUNE, "a fine-tune")
        folder = wait_for(
            lambda abandoned: snapshot_download(name, **filters),
            seconds=settings.download_seconds(),
            what=f"The download of {name}",
        )
        return Path(folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _explained(error, name, what=name) from error

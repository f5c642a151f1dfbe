"""Find the base of a run: a name becomes a folder in diffusers' layout.

A name is a folder, a repository of the hub, or a single-file checkpoint, which is converted once. Knows names and the two
layouts; does not load models.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl import settings
from sdxl.errors import DownloadError, WeightsError
from sdxl.files import hub, pipelines
from sdxl.files.archives import atomic_path
from sdxl.files.fetching import decode_data_uri, download, existing, is_data_uri, is_remote, shown
from sdxl.files.kept_folders import InUse, KeptFolders
from sdxl.files.part_files import present
from sdxl.files.sources import HUB_FILE
from sdxl.files.weight_files import WeightFile
from sdxl.model.base_checks import require_sdxl
from sdxl.model.noise_schedule import has_zero_snr, prediction_type, read_schedule
from sdxl.model.single_file_base import configuration, convert, convert_vae, has_vae, require_sdxl_file
from sdxl.settings import Prediction

log = logging.getLogger(__name__)

Found = tuple[Path, InUse]
"""A converted folder, and what keeps it from being deleted."""
_CONVERSION = "1"
"""Part of the key of a converted folder: raise it when the conversion changes."""
_DIGESTED = ("unet", "text_encoder", "text_encoder_2")
_BEGINNING = 64
"""Bytes of each tensor that the digest of a base reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A base on disk, checked: it is an SDXL."""

    name: str
    """What the user named, without secrets."""
    folder: Path
    """In diffusers' layout."""
    vae: Path
    """Folder of the autoencoder, which need not be in `folder`."""
    prediction: Prediction | None
    """What the base predicts by the user's setting; None for what its files say."""
    in_use: tuple[InUse, ...] = ()
    """Keeps converted folders as long as the base is used."""

    @property
    def schedule(self) -> dict[str, Any]:
        """The scheduler's configuration."""
        return read_schedule(self.folder, self.prediction)

    def replaced(self) -> dict[str, Any]:
        """Arguments for loading the base with another autoencoder and prediction than those in `folder`."""
        return {"vae": self.vae, "prediction": self.prediction}

    def facts(self) -> dict[str, Any]:
        """What the record of a training says about its base."""
        return {
            "base_sha256": digest(self.folder),
            "prediction_type": prediction_type(self.schedule),
            "zero_terminal_snr": has_zero_snr(self.schedule),
        }


def find_base(source: str, *, called: str = "SDXL_BASE") -> Base:
    """The base that `source` names, fetched and converted if necessary, with the autoencoder and the prediction that the
    settings name.

    source: a folder in diffusers' layout, a hub repository, or a single-file checkpoint: a path, a URL, a `data:` URI or
        `owner/repository/file.safetensors` on the hub.
    called: the environment variable or input that errors name.

    Raises:
        DownloadError: it cannot be fetched.
        WeightsError: it is no SDXL, is damaged or incomplete.
        UserInputError: a setting is wrong, or the source does not exist.
    """
    prediction, name, vae = settings.prediction(), _shown(source, called), settings.variable("SDXL_VAE")
    in_use: list[InUse] = []
    if _is_single_file(source):
        like = pipelines.local_folder(settings.config_name(), setting="SDXL_CONFIG", weights=())

        def build(file: WeightFile, folder: Path) -> None:
            require_sdxl_file(file)
            _require_vae(name, has_vae(file) or vae is not None)
            log.info("Converting %s to a folder (once)", name)
            convert(file, like, folder)

        folder, held = _converted(source, _digest_of_configuration(like), build, called=called)
        in_use.append(held)
        _require_vae(name, present(folder / "vae") is not None or vae is not None)
    else:
        # First only what is small: a model that is no SDXL is refused before its weights are fetched.
        require_sdxl(pipelines.local_folder(source, setting=called, weights=()), name)
        folder = pipelines.local_folder(source, setting=called)
    vae_folder = folder / "vae"
    if vae is not None:
        vae_folder, held = _find_vae(vae, folder / "vae")
        in_use += held
    return Base(name=name, folder=folder, vae=vae_folder, prediction=prediction, in_use=tuple(in_use))


def _shown(source: str, called: str) -> str:
    try:
        return shown(source)
    except ValueError as error:
        raise DownloadError(f"{called} is not a URL ({error}): check the address.") from error


def _require_vae(name: str, is_there: bool) -> None:
    if not is_there:
        raise WeightsError(
            f"{name} holds no autoencoder: set SDXL_VAE to one, such as SDXL 1.0's folder vae."
        )


def _find_vae(source: str, own: Path) -> tuple[Path, list[InUse]]:
    """The folder of the autoencoder that `SDXL_VAE` names, checked against the configuration of the base's `own`."""
    in_use: list[InUse] = []
    name = _shown(source, "SDXL_VAE")
    if _is_single_file(source):
        key = hashlib.sha256(b"vae" + (own / "config.json").read_bytes()).hexdigest()
        folder, held = _converted(
            source, key, lambda file, folder: convert_vae(file, own, folder), called="SDXL_VAE"
        )
        in_use.append(held)
    else:
        folder = pipelines.part_folder(source, "vae", setting="SDXL_VAE")
    try:
        ours, theirs = (_latents(part) for part in (own, folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"SDXL_VAE={name} is not an autoencoder in diffusers' layout ({error}): give another."
        ) from error
    if ours != theirs:
        raise WeightsError(
            f"SDXL_VAE={name} makes other latents ({theirs}) than the base's autoencoder ({ours}): give an "
            "autoencoder of SDXL."
        )
    return folder, in_use


def _latents(part: Path) -> dict[str, Any]:
    """What latents of an autoencoder a UNet must know."""
    config = json.loads((part / "config.json").read_text())
    return {
        "scaling_factor": config["scaling_factor"],
        "latent_channels": config.get("latent_channels", 4),
        "blocks": len(config["block_out_channels"]),
    }


def _is_single_file(source: str) -> bool:
    path = existing(str(Path(source).expanduser())) if not is_remote(source) else None
    if path is not None:
        return path.is_file()
    return is_remote(source) or HUB_FILE.fullmatch(source) is not None


def _converted(source: str, like: str, build: Callable[[WeightFile, Path], None], *, called: str) -> Found:
    """The folder that `build` makes of a single file: from the cache, else built now.

    like: what the conversion depends on besides the file.
    """
    kept = KeptFolders(settings.cache_folder() / "bases", settings.cache_limits().disk)
    if is_remote(source):
        return _of_remote(source, like, kept, build)
    path = existing(str(Path(source).expanduser())) or hub.single_file(source, setting=called)
    stat = path.resolve().stat()
    state = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
    return kept.get(_key(state, like), lambda folder: build(WeightFile(path, shown(source)), folder))


def _of_remote(source: str, like: str, kept: KeptFolders, build: Callable[[WeightFile, Path], None]) -> Found:
    """The converted folder of a URL or `data:` URI. Folders are kept by the content of the file.

    The server is asked whether the file has changed since the last time. If it does not answer, the converted folder is
    used.
    """
    own = _key("url", source)
    with kept.scratch(own) as scratch:
        note = kept.root / f".{own}.json"
        try:
            earlier = json.loads(note.read_text())
            found = kept.find(_key(earlier["content"], like))
        except (OSError, ValueError, KeyError, TypeError):
            earlier, found = {}, None
        if is_data_uri(source):
            path, validators = decode_data_uri(source, scratch), {}
        else:
            known = earlier["validators"] if found else None
            fetched = download(source, scratch, max_bytes=hub.LARGEST_BASE, validators=known)
            if fetched is None:
                assert found is not None
                return found
            path, validators = fetched.path, fetched.validators
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        found = kept.get(_key(content, like), lambda folder: build(WeightFile(path, shown(source)), folder))
        with atomic_path(note) as partial:
            partial.write_text(json.dumps({"content": content, "validators": validators}))
        return found


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_CONVERSION, *parts)).encode()).hexdigest()


def _digest_of_configuration(folder: Path) -> str:
    """A digest of what a conversion takes from the folder of another base."""
    total = hashlib.sha256()
    for path in configuration(folder):
        total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def digest(folder: Path) -> str:
    """What identifies the base in `folder`, in half a second: SHA-256 of the name, the type of numbers, the shape and the
    first 64 bytes of each tensor of the UNet and the text encoders, in the order of their names.

    A single-file checkpoint and the folder of the same numbers have the same digest, in one file or in shards. Another
    precision gives another digest. The autoencoder does not count, since fine-tunes do not depend on it.

    Raises:
        WeightsError: a file is damaged.
    """
    total = hashlib.sha256()
    for part in _DIGESTED:
        files = present(folder / part)
        tensors: dict[str, Any] = {}
        for file in files.weights if files else ():
            tensors |= WeightFile(folder / part / file, f"{part}/{file}").beginnings(_BEGINNING)
        for name, (dtype, shape, first) in sorted(
            (name.removeprefix("text_model."), tensor) for name, tensor in tensors.items()
        ):
            if not name.endswith("position_ids"):  # some versions of transformers save them
                total.update(f"{part} {name} {dtype} {shape}\0".encode() + first)
    return total.hexdigest()

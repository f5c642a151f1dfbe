"""The environment variables that configure a process, and the folders that they name.

Knows every `SDXL_*` variable, its default and its range; does not know the inputs of a run or any model.
"""

import logging
import os
import random
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sdxl.errors import UserInputError

log = logging.getLogger(__name__)

if sys.platform == "win32":  # here, because every entry point imports this module first
    sys.exit("This runs on Linux only, because it locks files as Linux does: on Windows, use WSL 2.")

VARIABLES = {
    "SDXL_BASE": "The base model: a folder in diffusers' layout, a hub repository, or a single-file checkpoint as a path, a URL or owner/repository/file.safetensors. Default: SDXL 1.0.",
    "SDXL_VAE": "Another autoencoder than the base's, in the same forms. Default: the base's.",
    "SDXL_PREDICTION": "What the base predicts if its files do not say so: epsilon, v_prediction, or v_prediction_ztsnr with zero terminal SNR. Default: what its files say.",
    "SDXL_CONFIG": "Where a single-file base takes its configuration and tokenizers from: a folder in diffusers' layout or a hub repository. Default: SDXL 1.0.",
    "SDXL_REFINER": "The refiner: a folder in diffusers' layout or a hub repository. Default: the refiner of SDXL 1.0.",
    "SDXL_CAPTIONER": "The captioning model: a folder in transformers' layout or a hub repository. Default: BLIP.",
    "SDXL_SEGMENTER": "The segmentation model, in the same form. Default: CLIPSeg.",
    "SDXL_UPSCALER": "The upscaling model, in the same form. Default: Swin2SR.",
    "SDXL_SCORER": "Whether a training scores its previews with DINOv2 and CLIP: auto (default), if both are in a folder or in the hub's cache; fetch, which fetches them once; none.",
    "SDXL_DINO": "The model that says how alike pictures are: a folder in transformers' layout or a hub repository. Default: DINOv2, small.",
    "SDXL_CLIP": "The model that says how well a picture shows a text, in the same form. Default: LAION's CLIP ViT-B/32.",
    "SDXL_SAFETY_CHECKER": "The pipeline whose safety checker judges pictures. Default: Stable Diffusion 1.4.",
    "SDXL_SPEED": "How a GPU runs the UNet: compiled (default), fp8, graphs or eager.",
    "SDXL_MEMORY": "Where serving keeps the model: auto (default), whole, 12gb, 8gb or cpu.",
    "SDXL_CACHE": "Folder for caches that outlive a run. Default: ~/.cache/sdxl-subject-tuning.",
    "SDXL_CACHE_DISK_GB": "Disk space for cached fine-tunes, in gigabytes. Default: 50.",
    "SDXL_CACHE_MEMORY_GB": "Memory for cached fine-tunes, in gigabytes. Default: a quarter of the machine's memory.",
    "SDXL_FINE_TUNES": "Folder with fine-tunes that requests to a server may name by their paths in it. Default: none.",
    "SDXL_INPUTS": "Folder with anything that requests to a server may name by its path: archives, pictures, fine-tunes, bases, states. Everyone who reaches the server can use all of it. Default: none.",
    "SDXL_PRIVATE_URLS": "1 lets requests to a server name URLs in private networks and on this machine. Default: 0.",
    "SDXL_PUSH_OWNERS": "Names on the Hugging Face hub, separated by commas, into whose repositories requests to a server may push with the server's own token (push_to). Default: none.",
    "SDXL_DOWNLOAD_MINUTES": "Time limit for one download. Default: 60.",
    "SDXL_KEEP_MINUTES": "How long a server keeps the files of a result after the run. Default: 10.",
    "SDXL_STATE": "Folder for the states of trainings, which a stopped one goes on from. In a container it should be one that outlives it. Default: state in SDXL_WORKSPACE.",
    "SDXL_WORKSPACE": "Folder in which each run creates its own folder. Default: the system's temporary folder.",
}
"""Variable → description. No other file reads the environment for a setting of this project."""

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"

Prediction = Literal["epsilon", "v_prediction", "v_prediction_ztsnr"]
Speed = Literal["compiled", "graphs", "eager", "fp8"]
Scorer = Literal["auto", "fetch", "none"]


def variable(name: str) -> str | None:
    """The value of one of `VARIABLES`; None if it is unset or empty."""
    assert name in VARIABLES
    return os.environ.get(name) or None


def base_name() -> str:
    """The base model: a folder in diffusers' layout, a hub name or a single file (`SDXL_BASE`)."""
    return variable("SDXL_BASE") or SDXL


def config_name() -> str:
    """The folder or hub name whose configuration and tokenizers single-file bases use (`SDXL_CONFIG`)."""
    return variable("SDXL_CONFIG") or SDXL


def prediction() -> Prediction | None:
    """What the base predicts (`SDXL_PREDICTION`); None for what its files say.

    - "epsilon": the noise.
    - "v_prediction": v (arXiv:2202.00512).
    - "v_prediction_ztsnr": v, with a noise schedule that ends in pure noise (arXiv:2305.08891).

    Raises:
        UserInputError: any other value.
    """
    setting = variable("SDXL_PREDICTION")
    if setting is not None and setting not in get_args(Prediction):
        raise UserInputError(
            f"SDXL_PREDICTION is {setting!r}, but must be one of {', '.join(get_args(Prediction))}."
        )
    return setting  # type: ignore[return-value]


def refiner_name() -> str:
    """The refiner: a folder in diffusers' layout or a hub name (`SDXL_REFINER`)."""
    return variable("SDXL_REFINER") or REFINER


def speed() -> Speed:
    """How a GPU runs the UNet (`SDXL_SPEED`).

    - "compiled": CUDA graphs of compiled blocks.
    - "fp8": as "compiled", and the base's linear layers multiply in fp8 if the GPU supports it: in drawing and in the
      training of a LoRA.
    - "graphs": CUDA graphs without compiling.
    - "eager": launches kernels one by one, for debugging.

    Raises:
        UserInputError: any other value.
    """
    return _one_of(get_args(Speed), "SDXL_SPEED", default="compiled")


def scorer() -> Scorer:
    """Whether trainings score their previews (`SDXL_SCORER`).

    - "auto": if the models are on this machine already.
    - "fetch": always; the models are fetched if necessary.
    - "none": never.

    Raises:
        UserInputError: any other value.
    """
    return _one_of(get_args(Scorer), "SDXL_SCORER", default="auto")


def _one_of(choices: tuple[Any, ...], name: str, *, default: str) -> Any:
    setting = variable(name) or default
    if setting not in choices:
        raise UserInputError(f"{name} is {setting!r}, but must be one of {', '.join(choices)}.")
    return setting


@dataclass(frozen=True, kw_only=True)
class CacheLimits:
    """The largest size of the cache of fine-tunes, in bytes."""

    disk: int
    memory: int


def cache_limits() -> CacheLimits:
    """The limits that `SDXL_CACHE_DISK_GB` and `SDXL_CACHE_MEMORY_GB` set.

    Raises:
        UserInputError: not a number, or below 0.
    """
    quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4e9
    return CacheLimits(
        disk=_gigabytes("SDXL_CACHE_DISK_GB", 50), memory=_gigabytes("SDXL_CACHE_MEMORY_GB", quarter)
    )


def _gigabytes(name: str, default: float) -> int:
    text = variable(name)
    try:
        value = float(text) if text else default
        if not 0 <= value < 1e9:
            raise ValueError
    except ValueError:
        raise UserInputError(f"{name} is {text!r}, but must be a number of gigabytes, such as 50.") from None
    return int(value * 1e9)


_SERVER = threading.Event()
"""Set if inputs come from strangers."""


def set_behind_server(active: bool) -> None:
    """Say whether inputs come from strangers through a server, rather than from the command line or a Python program."""
    if active:
        _SERVER.set()
    else:
        _SERVER.clear()


def behind_server() -> bool:
    """Whether inputs come from strangers through a server."""
    return _SERVER.is_set()


def public_urls_only() -> bool:
    """Whether downloads must come from the public internet: behind a server, unless `SDXL_PRIVATE_URLS` is 1."""
    return behind_server() and variable("SDXL_PRIVATE_URLS") not in ("1", "true")


def fine_tunes_folder() -> Path | None:
    """The folder whose fine-tunes strangers may name (`SDXL_FINE_TUNES`)."""
    name = variable("SDXL_FINE_TUNES")
    return Path(name).expanduser() if name else None


def inputs_folder() -> Path | None:
    """The folder all of whose files strangers may name, for every input (`SDXL_INPUTS`)."""
    name = variable("SDXL_INPUTS")
    return Path(name).expanduser() if name else None


def push_owners() -> tuple[str, ...]:
    """The owners on the hub into whose repositories requests to a server may push (`SDXL_PUSH_OWNERS`)."""
    return tuple(name.strip() for name in (variable("SDXL_PUSH_OWNERS") or "").split(",") if name.strip())


def download_seconds() -> float:
    """The time limit for one download (`SDXL_DOWNLOAD_MINUTES`).

    Raises:
        UserInputError: not a number above 0.
    """
    return _minutes("SDXL_DOWNLOAD_MINUTES", 60) * 60


def _minutes(name: str, default: float) -> float:
    text = variable(name)
    try:
        minutes = float(text) if text else default
        if not 0 < minutes < 1e6:
            raise ValueError
    except ValueError:
        raise UserInputError(
            f"{name} is {text!r}, but must be a number of minutes, such as {default}."
        ) from None
    return minutes


def environment(**changed: str) -> dict[str, str]:
    """The environment for a process that this one starts: its own, with some variables changed."""
    return {**os.environ, **changed}


def cache_folder() -> Path:
    """The folder for caches that outlive a run (`SDXL_CACHE`)."""
    return Path(variable("SDXL_CACHE") or "~/.cache/sdxl-subject-tuning").expanduser()


def workspace_parent() -> Path:
    """The folder in which each run creates its own (`SDXL_WORKSPACE`)."""
    return Path(variable("SDXL_WORKSPACE") or tempfile.gettempdir())


def state_folder() -> Path:
    """The folder for the states of trainings (`SDXL_STATE`)."""
    name = variable("SDXL_STATE")
    return Path(name).expanduser() if name else workspace_parent() / "state"


def keep_seconds() -> float:
    """How long a server keeps the files of a result after the run (`SDXL_KEEP_MINUTES`).

    Raises:
        UserInputError: not a number above 0.
    """
    return _minutes("SDXL_KEEP_MINUTES", 10) * 60


def resolve_seed(seed: int | None) -> int:
    """Return `seed` itself (0 is a valid seed), or a random one for None."""
    return random.SystemRandom().randrange(2**32) if seed is None else seed

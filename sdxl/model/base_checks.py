"""Whether a model is an SDXL that can be trained and drawn with, told from its configuration.

Knows the configurations of diffusers' pipelines; does not read weights, so that a wrong base is refused before they are
fetched.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdxl.errors import WeightsError
from sdxl.model.noise_schedule import has_zero_snr, prediction_type, read_schedule

log = logging.getLogger(__name__)

_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
_CHANNELS = {9: "an inpainting model", 8: "a model that edits pictures by instructions"}
"""Channels of the UNet's input → what such a model is."""
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's refiner"}
"""Width of the prompts that the UNet takes → what such a model is."""
_DISTILLED = re.compile(r"turbo|lightning|hyper|dmd|lcm|tcd", re.IGNORECASE)
_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_MOST, _MOST_LAYERS = 1_000_000, 128
"""Limits on the numbers in a configuration, since it may come from a stranger. SDXL has at most 49,408 and 32 layers."""


def require_sdxl(folder: Path, name: str) -> None:
    """Refuse a base in diffusers' layout that is no SDXL. Reads configuration files only.

    name: its name in messages.

    Raises:
        WeightsError: says what it is instead, or which file is missing or damaged.
    """
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise not_sdxl(name, "a model with another architecture than SDXL's")
    try:
        index, unet = (_read(folder / file) for file in ("model_index.json", "unet/config.json"))
        refuse_other_unets(name, unet.get("in_channels", 4), unet.get("cross_attention_dim"))
        classes = {part: _class(index.get(part)) for part in _ENCODERS}
        if classes["text_encoder"] is None and classes["text_encoder_2"] is not None:
            raise not_sdxl(name, _WIDTHS[1280])
        if classes != _ENCODERS or unet.get("addition_embed_type") != "text_time":
            raise not_sdxl(name, "another kind of model")
        encoders = [_read(folder / part / "config.json") for part in _ENCODERS]
        if sum(encoder["hidden_size"] for encoder in encoders) != unet["cross_attention_dim"]:
            raise not_sdxl(name, "a model whose UNet does not fit its text encoders")
        for config in (unet, *encoders, _read(folder / "vae" / "config.json")):
            _require_sane(config, name)
        schedule = read_schedule(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{name} is not a complete SDXL in diffusers' layout ({error}): fetch it again."
        ) from error
    kind = str(schedule.get("_class_name", ""))
    if "EDM" in kind or "Flow" in kind or prediction_type(schedule) not in ("epsilon", "v_prediction"):
        raise not_sdxl(name, f"a model with another kind of noise ({kind})")


def refuse_other_unets(name: str, channels: int, width: Any) -> None:
    """Refuse a UNet of another model than SDXL.

    channels: of its input.
    width: of the prompts that it takes.

    Raises:
        WeightsError: says whose UNet it is.
    """
    if channels != 4:
        kind = _CHANNELS.get(channels, "another kind of model")
        raise WeightsError(
            f"{name} is {kind}, whose UNet takes {channels} channels instead of 4: give the text-to-image SDXL that it was "
            "made from."
        )
    if width in _WIDTHS:
        raise not_sdxl(name, _WIDTHS[width])


def not_sdxl(name: str, kind: str) -> WeightsError:
    """The error for a base that is of another `kind`."""
    return WeightsError(f"{name} is {kind}, not a base of SDXL: give SDXL 1.0 or a model made from it.")


def tell_of_distillation(folder: Path, name: str) -> None:
    """Log that the base was probably distilled to draw in a few steps, as Turbo and Lightning are: by its name, or by its
    scheduler."""
    schedule = read_schedule(folder)
    trailing = schedule.get("timestep_spacing") == "trailing" and not has_zero_snr(schedule)
    few_steps = schedule.get("_class_name") in _FEW_STEPS
    if few_steps or trailing or _DISTILLED.search(name.rsplit("/", 1)[-1]):
        log.warning(
            "%s looks distilled to draw in a few steps. Training does not keep that: if pictures are blurred, draw with "
            "more steps, or train the model that it was made from.",
            name,
        )


def _read(file: Path) -> Mapping[str, Any]:
    read = json.loads(file.read_text())
    if not isinstance(read, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return read


def _class(entry: Any) -> str | None:
    """The class of a part in model_index.json, which is a pair of a library and a class."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _require_sane(config: Mapping[str, Any], name: str) -> None:
    for key, number in _numbers(config):
        if abs(number) > (_MOST_LAYERS if "layers" in key else _MOST):
            raise WeightsError(f"{name} has {key} {number}, more than any SDXL: give another base.")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Each number in a JSON value, with the key that it belongs to."""
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _numbers(part, inner)
    elif isinstance(value, list):
        if len(value) > _MOST_LAYERS and key.endswith(("channels", "types")):
            yield f"{key}_layers", len(value)
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int | float):
        yield key, value

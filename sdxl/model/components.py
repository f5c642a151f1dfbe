"""Load the components of an SDXL, and decide their precision.

Knows diffusers' layout and devices; does not know training or serving.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dataset_and_utils import TokenMap, add_tokens, eos_id, pool_at_eos
from sdxl.errors import WeightsError
from sdxl.files.part_files import present
from sdxl.files.weight_files import WeightFile
from sdxl.gpu import require_runnable, training_half
from sdxl.model.noise_schedule import read_schedule
from sdxl.settings import Prediction

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Components:
    """The components of an SDXL for training, frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    noise_scheduler: DDPMScheduler
    device: torch.device

    def freeze_text(self) -> None:
        """Move the text encoders to the CPU. Nothing in them takes gradients any longer."""
        for encoder in self.text_encoders:
            encoder.requires_grad_(False).to(torch.device("cpu"))  # type: ignore[arg-type]


@contextlib.contextmanager
def incomplete_base_named(folder: Path) -> Iterator[None]:
    """Turn an error of diffusers or transformers while loading from `folder` into a WeightsError that names it."""
    try:
        yield
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(
            f"{folder} is not a complete SDXL in diffusers' layout ({error}): fetch it again."
        ) from error


def default_device() -> torch.device:
    """The first CUDA device, else the CPU.

    Raises:
        UserInputError: the installed PyTorch does not run on this GPU.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        require_runnable(capability, torch.cuda.get_arch_list(), name)
        return device
    return torch.device("cpu")


def native_resolution(folder: Path) -> int:
    """The picture size in pixels (height = width) for which the base in `folder` was trained; 1024 for SDXL 1.0.

    Raises:
        WeightsError: the configuration files are missing or damaged.
    """
    with incomplete_base_named(folder):
        unet = json.loads((folder / "unet" / "config.json").read_text())
        vae = json.loads((folder / "vae" / "config.json").read_text())
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def weights_variant_of(part: Path) -> str | None:
    """diffusers' `variant` for one component's folder, such as "fp16", or None: that of the best complete one."""
    files = present(part)
    return files.variant if files else None


def load_unet(folder: Path, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """Load the UNet of the base or refiner in `folder`, frozen and in eval mode.

    Raises:
        WeightsError: its files are missing or damaged, or do not match its configuration.
    """
    try:
        return _load_unet(folder, dtype, device).requires_grad_(False).eval()
    except (torch.AcceleratorError, torch.OutOfMemoryError, WeightsError):
        raise  # errors of the GPU are RuntimeErrors too, but the files are not to blame
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        # Missing weights stay on the device "meta", which raises NotImplementedError, a RuntimeError.
        problem = "; ".join(str(error).split("\n\t"))
        raise WeightsError(
            f"{folder / 'unet'} is not a complete UNet in diffusers' layout ({problem}): fetch it again."
        ) from error


def _load_unet(folder: Path, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    variant = weights_variant_of(folder / "unet")
    path = folder / "unet" / f"diffusion_pytorch_model.{f'{variant}.' if variant else ''}safetensors"
    file = WeightFile(path, str(path))
    with torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(folder / "unet")
        unet: Any = UNet2DConditionModel.from_config(config)
    if path.is_file() and file.keys == unet.state_dict().keys():
        # The UNet holds three quarters of SDXL's bytes. This way it loads in 1.5 seconds, with diffusers in several.
        weights = file.read(pinned=device.type == "cuda")
        unet.load_state_dict(
            {name: value.to(device, non_blocking=True).to(dtype) for name, value in weights.items()},
            assign=True,
        )
        return unet
    # Sharded files and older names of weights: leave these to diffusers.
    return UNet2DConditionModel.from_pretrained(
        folder,
        subfolder="unet",
        variant=variant,
        use_safetensors=True,
        dtype=dtype,
        device_map={"": str(device)},
    )


def load_part(kind: Any, part: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a text encoder or an autoencoder of the class `kind` from the folder `part`, frozen and in eval mode.

    Raises:
        OSError, ValueError: its files are missing or damaged.
    """
    model = kind.from_pretrained(
        part,
        variant=weights_variant_of(part),
        use_safetensors=True,
        dtype=dtype,
        device_map={"": str(device)},  # directly onto the device, which also converts dtypes faster
    )
    return model.requires_grad_(False).eval()


def load_components(
    folder: Path,
    *,
    is_lora: bool,
    device: torch.device,
    vae: Path | None = None,
    prediction: Prediction | None = None,
    unet_waits: bool = False,
) -> Components:
    """Load every component from `folder` onto `device`, frozen and in eval mode.

    Precision: a UNet that trains in full is fp32, because updates of 1e-6 vanish in half precision. The autoencoder is
    fp32: it encodes each picture once, and its rounding errors would be learned. On CUDA all other frozen components are
    bf16. On a CPU, and on a GPU without bf16, everything is fp32.

    vae: folder of another autoencoder.
    prediction: what the base predicts, instead of what its files say.
    unet_waits: leave the UNet on the CPU.

    Raises:
        WeightsError: a component is missing or does not belong to an SDXL.
    """
    half = training_half(device)
    with incomplete_base_named(folder):
        noise_scheduler: Any = DDPMScheduler.from_config(read_schedule(folder, prediction))
        components = Components(
            unet=load_unet(
                folder, half if is_lora else torch.float32, torch.device("cpu") if unet_waits else device
            ),
            vae=load_part(AutoencoderKL, vae or folder / "vae", torch.float32, device),
            text_encoders=(
                load_part(CLIPTextModel, folder / "text_encoder", half, device),
                load_part(CLIPTextModelWithProjection, folder / "text_encoder_2", half, device),
            ),
            tokenizers=load_tokenizers(folder),
            noise_scheduler=noise_scheduler,
            device=device,
        )
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        pool_at_eos(encoder, eos_id(tokenizer))
    return components


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of the base in `folder`, which load in a moment.

    Raises:
        WeightsError: their files are missing or damaged.
    """
    with incomplete_base_named(folder):
        return (
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2"),
        )


def add_placeholder_tokens(components: Components, token_map: TokenMap) -> tuple[list[int], list[int]]:
    """Add the map's placeholder tokens `<s0>`, … to both tokenizers; return their ids for each tokenizer."""
    first, second = (add_tokens(tokenizer, token_map.new_tokens) for tokenizer in components.tokenizers)
    return first, second

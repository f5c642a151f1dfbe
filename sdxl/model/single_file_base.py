"""A single-file checkpoint of SDXL becomes a folder in diffusers' layout.

The file holds weights under LDM's names and nothing else. Configuration and tokenizers come from another folder, whose
shapes the weights must have. Knows both layouts; does not know where files come from or are kept.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl.errors import WeightsError, some_of
from sdxl.files.pipelines import PIPELINE
from sdxl.files.weight_files import WeightFile
from sdxl.model import ldm_names
from sdxl.model.base_checks import not_sdxl, refuse_other_unets
from sdxl.model.ldm_names import CLIP_G, CLIP_L, UNET, VAE
from sdxl.model.noise_schedule import predicting, read_schedule, write_schedule
from sdxl.settings import Prediction

_DIFFUSION, _TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
_PROMPT = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
"""A matrix of SDXL's UNet that takes the prompt: [channels, width of the prompt]."""
_PROMPTS = (_PROMPT, "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
"""The same in the first attention of SDXL or its refiner, and of Stable Diffusion 1 and 2."""
_EDM = ("edm_mean", "edm_vpred.sigma_max")
"""Marks of models that were trained with another kind of noise."""
_OTHER_ARCHITECTURES = ("double_blocks.", "joint_blocks.", "double_layers.", "transformer_blocks.0.attn.")
_READ = (torch.float16, torch.bfloat16, torch.float32)
_QUARTER = (torch.float8_e4m3fn, torch.float8_e5m2)

Weights = dict[str, Tensor]


def require_sdxl_file(file: WeightFile) -> None:
    """Refuse a file that is no single-file checkpoint of SDXL. Reads its header only.

    Raises:
        WeightsError: says what it is, or what it lacks.
    """
    shapes = file.shapes
    if any(name in shapes for name in _EDM):
        raise not_sdxl(file.name, "a model with another kind of noise (EDM)")
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        kind = "no checkpoint with the UNet of a Stable Diffusion"
        if any(mark in name for name in shapes for mark in _OTHER_ARCHITECTURES):
            kind = "a model with another architecture than SDXL's"
        elif any("lora" in name for name in shapes):
            kind = "a LoRA"
        elif "conv_in.weight" in shapes or "input_blocks.0.0.weight" in shapes:
            kind = "only a UNet"
        raise not_sdxl(file.name, kind)
    prompts = [shapes[UNET + name] for name in _PROMPTS if UNET + name in shapes]
    refuse_other_unets(file.name, first[1] if len(first) == 4 else 0, prompts[-1][-1] if prompts else None)
    for part, prefix in {"first text encoder": CLIP_L, "second text encoder": CLIP_G}.items():
        if not any(name.startswith(prefix) for name in shapes):
            raise WeightsError(
                f"{file.name} lacks the {part}: give a checkpoint that holds the UNet and both text encoders."
            )


def has_vae(file: WeightFile) -> bool:
    """Whether a checkpoint holds an autoencoder."""
    return f"{VAE}encoder.conv_in.weight" in file.keys


def prediction_of(file: WeightFile) -> Prediction | None:
    """What the base in a checkpoint predicts, by the marks that trainers leave in it; None if there are none.

    Such marks are the empty tensors `v_pred` and `ztsnr`, and the entry `modelspec.prediction_type` of the metadata.
    """
    v = "v_pred" in file.keys or file.metadata.get("modelspec.prediction_type", "").startswith("v")
    if not v:
        return None
    return "v_prediction_ztsnr" if "ztsnr" in file.keys else "v_prediction"


def configuration(like: Path) -> list[Path]:
    """The files of configurations and tokenizers in the folder of a base."""
    files = [path for part in PIPELINE for path in (like / part).glob("*")]
    wanted = [path for path in files if path.suffix in (".json", ".txt") and ".index." not in path.name]
    return [like / "model_index.json", *sorted(wanted)]


def convert(file: WeightFile, like: Path, folder: Path) -> None:
    """Write the base in the checkpoint `file` into `folder`, in diffusers' layout. Numbers keep their precision.

    A checkpoint without an autoencoder gives a folder without its weights. The numbers of one part are in memory at a time.

    like: folder with the configuration and the tokenizers of an SDXL.

    Raises:
        WeightsError: the file is no checkpoint of an SDXL, or has other shapes than `like`.
    """
    require_sdxl_file(file)
    for path in configuration(like):
        copied = folder / path.relative_to(like)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    write_schedule(folder, predicting(read_schedule(like), prediction_of(file)))
    _write_unet(file, folder / "unet")
    if has_vae(file):
        _write_vae(file, VAE, folder / "vae")
    _write_encoder(file, CLIP_L, CLIPTextModel, folder / "text_encoder", _clip_l)
    _write_encoder(
        file, CLIP_G, CLIPTextModelWithProjection, folder / "text_encoder_2", ldm_names.clip_g_from_ldm
    )


def convert_vae(file: WeightFile, like: Path, folder: Path) -> None:
    """Write the autoencoder in `file` into `folder`, in diffusers' layout.

    file: an autoencoder alone, under LDM's or diffusers' names, or a whole checkpoint.
    like: folder with the configuration of the autoencoder.

    Raises:
        WeightsError: the file holds no autoencoder, or has other shapes than `like`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(like / "config.json", folder / "config.json")
    prefix = VAE if has_vae(file) else ""
    if f"{prefix}encoder.conv_in.weight" not in file.keys:
        raise WeightsError(f"{file.name} holds no autoencoder: give one of SDXL.")
    _write_vae(file, prefix, folder)


def _write_unet(file: WeightFile, part: Path) -> None:
    config: Any = UNet2DConditionModel.load_config(part)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    wanted = unet.state_dict()
    aliases = ldm_names.unet_names(wanted, config)
    read = _read(file, UNET)
    found = {name: read[alias] for name, alias in aliases.items() if alias in read}
    _save(found, wanted, part / _DIFFUSION, file.name)


def _write_vae(file: WeightFile, prefix: str, part: Path) -> None:
    config: Any = AutoencoderKL.load_config(part)
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config)
    wanted = vae.state_dict()
    read = _read(file, prefix)
    if "decoder.mid_block.resnets.0.conv1.weight" in read:
        found = {name: read[name] for name in wanted if name in read}
    else:
        with _shapes_of(file.name):
            found = ldm_names.vae_from_ldm(read, wanted, config)
    _save(found, wanted, part / _DIFFUSION, file.name)


def _write_encoder(
    file: WeightFile, prefix: str, kind: Any, part: Path, renamed: Callable[[Weights], Weights]
) -> None:
    with torch.device("meta"):
        wanted = kind(CLIPTextConfig.from_pretrained(part)).state_dict()
    with _shapes_of(file.name):
        found = renamed(_read(file, prefix))
    names = [_published(name) for name in wanted]
    _save(
        {_published(name): value for name, value in found.items() if _published(name) in names},
        dict(zip(names, wanted.values(), strict=True)),
        part / _TRANSFORMERS,
        file.name,
    )


@contextlib.contextmanager
def _shapes_of(name: str) -> Iterator[None]:
    """Say that a tensor cannot be cut or turned as the layouts require it."""
    try:
        yield
    except (ValueError, IndexError, RuntimeError) as error:
        raise WeightsError(
            f"{name} has weights of another shape than SDXL's: give a base of SDXL."
        ) from error


def _published(name: str) -> str:
    """A text encoder's name with the level `text_model`, as SDXL is published: every version of transformers reads it."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _clip_l(weights: Weights) -> Weights:
    """The first text encoder has transformers' own names."""
    return weights


def _read(file: WeightFile, prefix: str) -> Weights:
    """The tensors whose names begin with `prefix`, without it, in a precision that every part can be loaded from."""
    read = file.read({name for name in file.keys if name.startswith(prefix)})
    return {name.removeprefix(prefix): _plain_numbers(value) for name, value in read.items()}


def _plain_numbers(value: Tensor) -> Tensor:
    """fp8 becomes fp16, fp64 becomes fp32. Integers, such as position ids, stay: no weight of SDXL is one."""
    if value.dtype in _QUARTER:
        return value.to(torch.float16)
    return value.float() if value.dtype == torch.float64 else value


def _save(found: Weights, wanted: Mapping[str, Tensor], target: Path, name: str) -> None:
    """Save the weights of a part, if they are all there and have the shapes of `wanted`."""
    missing = wanted.keys() - found.keys()
    if missing:
        raise WeightsError(
            f"{name} lacks {some_of(sorted(missing))} of the {target.parent.name}: give a complete checkpoint of SDXL."
        )
    for key, value in found.items():
        if value.shape != wanted[key].shape or value.dtype not in _READ:
            raise WeightsError(
                f"{name} is no SDXL like the configuration (at {target.parent.name}, {key}, {list(value.shape)}, "
                f"{value.dtype}): set SDXL_CONFIG to the base that it was made from."
            )
    save_file({key: value.contiguous() for key, value in found.items()}, target, metadata={"format": "pt"})

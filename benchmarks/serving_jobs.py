"""The requests of `benchmarks.serving`: every mode, every source of fine-tunes, wrong inputs, cancelled requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl.files.archives import pack_tar
from sdxl.serving.samplers import SCHEDULERS

BASE = Path(__file__).parent.parent / "base_models" / "tiny-sdxl"


@dataclass(frozen=True)
class Job:
    """One kind of request."""

    kind: str
    inputs: dict[str, Any]
    error: str | None = None
    """Text that the error must contain."""


def make_fine_tunes(folder: Path) -> Path:
    """Write a whole UNet and two LoRAs with random weights as tars; return their folder."""
    made = folder / "fine_tunes"
    made.mkdir()
    torch.manual_seed(0)
    unet = load_file(BASE / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    whole = {name: value + 0.02 * torch.randn_like(value) for name, value in unet.items()}
    contents = {"whole": ("unet.safetensors", whole)}
    for name in ("one", "two"):
        contents[name] = ("lora.safetensors", random_lora(unet))
    for name, (inside, tensors) in contents.items():
        save_file(tensors, made / "weights")
        pack_tar({inside: made / "weights"}, made / f"{name}.tar")
        (made / "weights").unlink()
    return made


def random_lora(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of rank 4 with random weights on the queries of a UNet, given by its weights."""
    lora = {}
    for key, value in unet.items():
        if key.endswith("to_q.weight"):
            layer = f"unet.{key.removesuffix('.weight')}"
            lora[f"{layer}.lora_A.weight"] = torch.randn(4, value.shape[1])
            lora[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(value.shape[0], 4)
    return lora


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def all_jobs(folder: Path, url: str) -> list[Job]:
    """Every kind of request, each small and with few steps."""
    image = Image.effect_noise((96, 64), 70).convert("RGB")
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rectangle((40, 10, 80, 50), fill=255)
    small = {"prompt": "a red fish on a blue background", "width": 64, "height": 64, "num_inference_steps": 2}
    small |= {"seed": 1, "disable_safety_checker": True}
    inpaint = {**small, "width": 96, "height": 64, "image": picture_uri(image), "mask": picture_uri(mask)}
    redraw = {key: value for key, value in inpaint.items() if key != "mask"}
    tars = {name: folder / "fine_tunes" / f"{name}.tar" for name in ("whole", "one", "two")}
    one = {**small, "replicate_weights": data_uri(tars["one"].read_bytes(), "application/x-tar")}
    jobs = [Job("base", {**small, "scheduler": name}) for name in SCHEDULERS]
    jobs += [
        Job("base", {**small, "num_outputs": 2, "guidance_scale": 1.0}),
        Job("base", {**small, "width": 128, "height": 96, "negative_prompt": "green"}),
        Job("base", {**small, "output_format": "jpg", "apply_watermark": False}),
        Job("safety", {**small, "disable_safety_checker": False, "output_format": "webp"}),
        Job("image", redraw),
        Job("image", {**redraw, "scheduler": "K_EULER_ANCESTRAL", "prompt_strength": 1.0}),
        Job("inpaint", inpaint),
        Job("inpaint", {**inpaint, "scheduler": "HeunDiscrete", "refine": "base_image_refiner"}),
        Job("refine", {**small, "refine": "expert_ensemble_refiner", "high_noise_frac": 0.5}),
        Job("refine", {**small, "refine": "base_image_refiner", "refine_steps": 4}),
        Job("whole UNet", {**small, "replicate_weights": str(tars["whole"])}),
        Job("whole UNet", {**inpaint, "replicate_weights": f"{url}/whole.tar"}),
        Job("LoRA", one),
        Job("LoRA", {**one, "lora_scale": 0.5}),
        Job("LoRA", {**small, "replicate_weights": f"{url}/two.tar"}),
        Job("LoRAs", {**one, "extra_lora": [str(tars["two"])], "extra_lora_scale": [0.5]}),
        Job("LoRAs", {**small, "replicate_weights": str(tars["whole"]), "extra_lora": [str(tars["one"])]}),
        Job("wrong", {**small, "width": 100}, "width is 100"),
        Job("wrong", {**small, "scheduler": "EULER"}, "scheduler"),
        Job("wrong", {**small, "num_inference_steps": "many"}, "num_inference_steps"),
        Job("wrong", {**small, "image": data_uri(b"no picture", "image/png")}, "cannot be read as a picture"),
        Job("wrong", {**small, "mask": picture_uri(mask)}, "without image"),
        Job("wrong", {**small, "replicate_weights": "/nowhere.tar"}, "takes no paths"),
        Job("wrong", {**small, "replicate_weights": str(folder / "server.log")}, "takes no paths"),
        Job("wrong", {**small, "replicate_weights": f"{url}/nothing.tar"}, "HTTP 404"),
        Job("wrong", {**small, "replicate_weights": data_uri(b"x", "application/x-tar")}, "is a text file"),
        Job(
            "wrong",
            {**small, "extra_lora": [str(tars["whole"])], "replicate_weights": str(tars["one"])},
            "UNet",
        ),
    ]
    for name in ("whole", "one"):
        long = {**small, "num_inference_steps": 400, "replicate_weights": str(tars[name])}
        jobs.append(Job("cancelled", long))
    return jobs

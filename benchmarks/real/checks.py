"""All checks, in the order in which they run: what is cheap and what others depend on comes first."""

from __future__ import annotations

import platform

import torch

from benchmarks.real import (  # noqa: F401 - each registers its checks
    autoencoder,
    conversion,
    drawing,
    files,
    findings,
    helpers,
    machine,
    text,
    training,
)
from sdxl import settings

ORDER = (
    "machine",
    "files",
    "configuration",
    "tokenizers",
    "pooling",
    "embeddings",
    "autoencoder_range",
    "latents",
    "fp8_range",
    "drawing",
    "refiner_files",
    "refiner",
    "captioner",
    "segmenter",
    "upscaler",
    "scorer",
    "safety_checker",
    "open_nsfw",
    "single_file",
    "training",
    "lora_in_diffusers",
)
CHECKS = {name: findings.CHECKS[name] for name in ORDER}
"""Name → check."""
assert CHECKS.keys() == findings.CHECKS.keys(), "every check has its place in the order"


def about(photo: str) -> dict[str, str]:
    """What is checked, and on which machine."""
    base = settings.base_name()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    told = {"base": base, "photograph": photo, "device": device, "PyTorch": torch.__version__}
    return {name: findings.without_private_paths(value) for name, value in told.items()}

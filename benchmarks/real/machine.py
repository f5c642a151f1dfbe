"""Checks of the machine: the GPU, what it can compute, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup
from sdxl.serving.placement import placement_here
from sdxl.serving.unet_runner import speed_here
from sdxl.speed import fp8

PINS = (Path("requirements-dev.txt"), Path("requirements.txt"))
"""The tested versions: of the local environment, and of the container."""
_GPU_PACKAGES = ("torch",)
"""Packages whose build for a GPU has a suffix, such as 2.13.0+cu130."""


@check("What machine is this, and are the packages the tested ones?")
def machine(setup: Setup, notes: Notes) -> None:
    """The GPU and what it can do, the compiler, and the versions of all pinned packages."""
    notes.fact("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    notes.fact("processor cores, memory", f"{os.cpu_count()}, {memory:.0f} GiB")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        notes.fact("GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        notes.fact("compute capability", f"{properties.major}.{properties.minor}")
        notes.fact("CUDA of PyTorch", torch.version.cuda)
        notes.equal("GPU computes in bf16", True, torch.cuda.is_bf16_supported(including_emulation=False))
        notes.fact("GPU multiplies in fp8", fp8.is_supported(setup.device))
    notes.expect(
        "a GPU, as SDXL needs one in practice",
        "yes",
        "yes" if torch.cuda.is_available() else "no",
        torch.cuda.is_available(),
        applies=setup.is_sdxl,
    )
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    notes.fact("C compiler, which Triton needs", Path(compiler).name if compiler else "none")
    notes.fact("Triton", importlib.util.find_spec("triton") is not None)
    placement = placement_here()
    notes.fact("serving", f"{placement.describe()}; SDXL_SPEED is {speed_here(placement)}")
    for name, versions in pins().items():
        found = installed(name)
        bare = found.partition("+")[0] if name in _GPU_PACKAGES else found
        notes.expect(f"version of {name}", " or ".join(versions), found, bare in versions)


def pins() -> dict[str, list[str]]:
    """Package of the container → its tested versions."""
    read = [dict(re.findall(r"^([\w-]+)==(\S+)", path.read_text(), re.MULTILINE)) for path in PINS]
    return {name: list(dict.fromkeys(one[name] for one in read if name in one)) for name in read[-1]}


def installed(name: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

"""Checks of the autoencoder: the range of its activations in each precision, and the latents of a photograph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup, as_picture, read_config, relative_error

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_FP16 = torch.finfo(torch.float16).max


@check("In which precisions does the autoencoder work without overflow?")
def autoencoder_range(setup: Setup, notes: Notes) -> None:
    """The largest activation in fp32, and what is not finite in bf16 and fp16."""
    pixels, upcast = setup.photo_pixels(), _config(setup).get("force_upcast", True)
    vae = setup.autoencoder(torch.float32)
    for part in ("encoder", "decoder"):
        with _largest(getattr(vae, part)) as largest:
            vae.decode(_latents(vae, pixels))
        notes.expect(
            f"{part} in fp32: all values are finite",
            "yes",
            math.isfinite(largest[0]),
            math.isfinite(largest[0]),
        )
        notes.fact(f"{part} in fp32: largest activation (fp16 ends at {MOST_FP16:g})", largest[0])
    del vae
    finite = {}
    for name, dtype in HALVES.items():
        vae = setup.autoencoder(dtype)
        latents = _latents(vae, pixels.to(dtype))
        decoded = vae.decode(latents, return_dict=False)[0]
        finite[name] = bool(torch.isfinite(latents).all() and torch.isfinite(decoded).all())
        notes.picture(as_picture(decoded[0].nan_to_num(0)), f"encoded and decoded in {name}")
    notes.equal("bf16: all values are finite", True, finite["bf16"])
    notes.equal("fp16: all values are finite", False, finite["fp16"], applies=setup.is_sdxl)
    notes.expect(
        "force_upcast is set if fp16 overflows",
        "yes",
        "yes" if upcast else "no",
        finite["fp16"] or bool(upcast),
    )


@check("Have the latents of a photograph the scale that the UNet expects, and what does half precision cost?")
def latents(setup: Setup, notes: Notes) -> None:
    """Mean and spread of scaled latents, their error in half precision, and the photograph decoded again."""
    pixels, scale = setup.photo_pixels(), _config(setup)["scaling_factor"]
    vae = setup.autoencoder(torch.float32)
    exact = _latents(vae, pixels)
    decoded = vae.decode(exact, return_dict=False)[0]
    scaled = exact * scale
    for index in range(scaled.shape[1]):
        channel = scaled[:, index]
        notes.fact(
            f"channel {index}: mean, standard deviation",
            f"{float(channel.mean()):.3f}, {float(channel.std()):.3f}",
        )
    notes.between("standard deviation of all scaled latents", 0.5, 1.6, float(scaled.std()))
    notes.at_most("mean of all scaled latents, without its sign", 1, abs(float(scaled.mean())))
    shown = decoded.clamp(-1, 1)
    fidelity = 10 * math.log10(4 / max(float((shown - pixels).square().mean()), 1e-12))
    notes.between(
        "photograph encoded and decoded again, in fp32", 24, 60, fidelity, unit=" dB", applies=setup.is_sdxl
    )
    notes.fact("photograph encoded and decoded again, in fp32, dB", fidelity)
    del vae
    for name, dtype in HALVES.items():
        half = setup.autoencoder(dtype)
        error = relative_error(_latents(half, pixels.to(dtype)), exact)
        if name == "bf16":
            notes.at_most("error of latents encoded in bf16", 2, error, unit=" %")
        else:
            notes.fact(f"error of latents encoded in {name}, %", error)
        again = half.decode(exact.to(dtype), return_dict=False)[0]
        notes.fact(f"error of a picture decoded in {name}, %", relative_error(again, decoded))
    notes.picture(setup.photo.square(setup.side), f"the photograph: {setup.photo.name}")
    notes.picture(as_picture(shown[0]), "encoded and decoded in fp32")


def _config(setup: Setup) -> dict[str, Any]:
    return read_config(setup.base.vae.parent, setup.base.vae.name)


def _latents(vae: Any, pixels: Tensor) -> Tensor:
    """The mean of the posterior, not scaled: [1, 4, h, w]."""
    return vae.encode(pixels).latent_dist.mode()


@contextmanager
def _largest(module: nn.Module) -> Iterator[list[float]]:
    """The largest absolute output of any layer in `module` while the context lasts; NaN or infinite if one is so."""
    largest = [0.0]

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            value = float(output.detach().abs().max())
            largest[0] = value if not math.isfinite(value) else max(largest[0], value)

    handles = [layer.register_forward_hook(note) for layer in module.modules()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()

"""The export stage: trained weights → folders in diffusers' SDXL layout."""

from __future__ import annotations

from pathlib import Path

from tiny_world.autoencoder import load_vae
from tiny_world.models import (
    FULL,
    SMOKE,
    base_pipeline,
    build_text_encoders,
    build_unet,
    refiner_pipeline,
    save_half,
)
from tiny_world.training import Run, load_half_weights


def export(run: Run, output: Path) -> None:
    """Write `tiny-sdxl/` into `output` as variant fp16, and `tiny-sdxl-refiner/` if there is a trained refiner."""
    sizes = SMOKE if run.smoke else FULL
    first, second = build_text_encoders(sizes)
    unet = build_unet(sizes)
    for name, part in (("text_encoder", first), ("text_encoder_2", second), ("unet", unet)):
        load_half_weights(part, run.fetch / f"{name}.safetensors")
    vae = load_vae(run).cpu()
    size = save_half(base_pipeline(vae, first, second, unet), output / "tiny-sdxl")
    run.record("export", folder="tiny-sdxl", megabytes=round(size / 1e6, 2))
    weights = run.fetch / "refiner_unet.safetensors"
    if weights.exists():
        unet = build_unet(sizes, refiner=True)
        load_half_weights(unet, weights)
        size = save_half(refiner_pipeline(vae, second, unet), output / "tiny-sdxl-refiner")
        run.record("export", folder="tiny-sdxl-refiner", megabytes=round(size / 1e6, 2))

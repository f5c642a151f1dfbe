"""Sheets of pictures with captions, and the loss curve. Uses Pillow only."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """[3, h, w] in 0..1 → an RGB image."""
    return Image.fromarray(
        (image.clamp(0, 1).permute(1, 2, 0).float().cpu().numpy() * 255).round().astype(np.uint8)
    )


def save_grid(
    images: Tensor, file: Path, *, columns: int, captions: list[str] | None = None, side: int = 160
) -> None:
    """Save pictures [n, 3, h, w] in 0..1 as a grid, with captions below them."""
    margin = 40 if captions else 2
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = (i % columns) * (side + 4), (i // columns) * (side + margin)
        sheet.paste(to_pil(image).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        if captions:
            draw.text((x + 2, y + side + 2), "\n".join(textwrap.wrap(captions[i], 28)[:3]), fill="black")
    sheet.save(file)


def save_curve(log: Path, file: Path) -> None:
    """Plot the losses of a log on a logarithmic axis, with one panel for each stage."""
    stages: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            stages.setdefault(entry["stage"], []).append((entry["step"], entry["loss"]))
    if not stages:
        return
    width, height = 420, 260
    image = Image.new("RGB", (width * len(stages), height), "white")
    draw = ImageDraw.Draw(image)
    for i, (stage, points) in enumerate(stages.items()):
        steps = torch.tensor([p[0] for p in points], dtype=torch.float32)
        losses = torch.tensor([p[1] for p in points]).clamp_min(1e-6).log10()
        low, high = float(losses.min()), float(losses.max()) + 1e-6
        xs = i * width + 40 + (steps / steps.max()) * (width - 60)
        ys = 30 + (high - losses) / (high - low) * (height - 70)
        draw.rectangle((i * width + 40, 30, i * width + width - 20, height - 40), outline="gray")
        if len(points) > 1:
            draw.line([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)], fill="blue", width=2)
        draw.text(
            (i * width + 44, 10),
            f"{stage}: loss {10**high:.4f} to {10**low:.4f}, {points[-1][0]} steps",
            fill="black",
        )
    image.save(file)

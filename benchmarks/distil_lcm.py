"""`python -m benchmarks.distil_lcm`: distil an LCM LoRA of the miniature, which draws in 4 to 8 steps.

Latent consistency distillation (arXiv:2310.04378) into LoRA matrices (arXiv:2311.05556). The teacher is the base with
guidance. From noisy latents it goes one step of a skipping DDIM solver towards the picture. The student, the base with the
LoRA, learns to predict the same picture from both ends of that step, without guidance. Scenes are those that the pretraining
may show. Takes a minute on a GPU and 20 on two CPU cores. `--judge` then draws held-out prompts in few steps, with and without
the LoRA: how many are followed, how sharp and how grainy pictures are, and a sheet to look at.

    python -m benchmarks.distil_lcm --output runs/lcm.safetensors --judge 100
    SDXL_BASE=base_models/tiny-sdxl python predict.py -i prompt="a red fish" -i extra_lora=@runs/lcm.safetensors \
        -i scheduler=LCM -i guidance_scale=1 -i num_inference_steps=4 -o pictures/
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from benchmarks.fast import SHOWN, drawn, followed
from benchmarks.subject_job import BASE
from sdxl.data.contact_sheet import Row, contact_sheet
from sdxl.serving.painter import Painter
from sdxl.serving.request import FineTuneOptions
from sdxl.serving.samplers import make_scheduler
from sdxl.training.trainable import LORA_TARGETS
from tiny_world.autoencoder import AT_ONCE, images_of
from tiny_world.bank import make_all, orders
from tiny_world.base import Latents, draw, encode
from tiny_world.captions import held_out_prompts

SOLVER_STEPS = 50
"""Steps of the teacher's schedule: the LCM sampler draws from the same timesteps."""
HUBER = 1e-3
"""Where the loss changes from squares to absolute values."""
SEED = 700_000
"""Of the scenes; those of the pretraining have smaller ones."""
STEPS = (4, 8)
"""Steps that `--judge` draws in."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """n noisy latents on their way to a picture, with the conditions for the teacher and the student."""

    noisy: Tensor
    """[n, 4, h, w] at `times`."""
    times: Tensor
    """Timesteps [n] of the solver's schedule."""
    prompt: tuple[Tensor, Tensor, Tensor]
    """Hidden states [n, 77, dim], pooled prompts [n, dim] and time ids [n, 6]."""


class Distillation:
    """The student and its teacher in one UNet: the LoRA is on for one and off for the other."""

    def __init__(self, pipeline: Any, *, rank: int, guidance: float) -> None:
        """Add the LoRA to the pipeline's UNet.

        guidance: the scale of classifier-free guidance that the student learns.
        """
        self.pipeline, self.unet, self.guidance = pipeline, pipeline.unet, guidance
        sampler = make_scheduler("LCM", pipeline)
        assert isinstance(sampler, LCMScheduler)
        self.sampler = sampler
        self.alphas = sampler.alphas_cumprod.to(self.unet.device)
        self.unet.requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS["all"]
            )
        )
        self.parameters = [one for one in self.unet.parameters() if one.requires_grad]

    def batch(self, bank: Latents, count: int) -> Batch:
        """Random latents of the bank with random noise."""
        z, ids, time_ids = draw(bank, count)
        with torch.no_grad():
            hidden, pooled = encode(self.pipeline.text_encoder, self.pipeline.text_encoder_2, ids)
        skip = len(self.alphas) // SOLVER_STEPS
        times = skip * torch.randint(1, SOLVER_STEPS + 1, (count,), device=z.device) - 1
        level = self.alphas[times].view(-1, 1, 1, 1)
        noisy = level.sqrt() * z + (1 - level).sqrt() * torch.randn_like(z)
        return Batch(noisy=noisy, times=times, prompt=(hidden, pooled, time_ids))

    def loss(self, batch: Batch) -> Tensor:
        """The pseudo-Huber distance between the student's two predictions of the picture."""
        with torch.no_grad():
            nearer, earlier = self._teacher_step(batch)
            target = self._consistent(nearer, earlier, batch.prompt)
        found = self._consistent(batch.noisy, batch.times, batch.prompt)
        return ((found - target).square() + HUBER**2).sqrt().sub(HUBER).mean()

    def _teacher_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The latents after one DDIM step with guidance, and their timesteps [n]."""
        earlier = (batch.times - len(self.alphas) // SOLVER_STEPS).clamp_min(0)
        self.unet.disable_adapters()
        try:
            with_prompt = self._noise(batch.noisy, batch.times, batch.prompt)
            hidden, pooled, time_ids = batch.prompt
            none = (torch.zeros_like(hidden), torch.zeros_like(pooled), time_ids)
            without = self._noise(batch.noisy, batch.times, none)
        finally:
            self.unet.enable_adapters()
        noise = without + self.guidance * (with_prompt - without)
        level = self.alphas[earlier].view(-1, 1, 1, 1)
        picture = self._picture(batch.noisy, noise, batch.times)
        return level.sqrt() * picture + (1 - level).sqrt() * noise, earlier

    def _consistent(self, noisy: Tensor, times: Tensor, prompt: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The student's prediction of the picture [n, 4, h, w]; at timestep 0 it is `noisy` itself."""
        skip, out = (
            share.view(-1, 1, 1, 1)
            for share in self.sampler.get_scalings_for_boundary_condition_discrete(times.float())
        )
        return skip * noisy + out * self._picture(noisy, self._noise(noisy, times, prompt), times)

    def _picture(self, noisy: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        level = self.alphas[times].view(-1, 1, 1, 1)
        return (noisy - (1 - level).sqrt() * noise) / level.sqrt()

    def _noise(self, noisy: Tensor, times: Tensor, prompt: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        hidden, pooled, time_ids = prompt
        told = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(noisy, times, hidden, added_cond_kwargs=told, return_dict=False)[0]

    def save(self, file: Path) -> None:
        """Write the LoRA as diffusers does; the file is there completely or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.stem}.partial.safetensors")
        StableDiffusionXLPipeline.save_lora_weights(
            file.parent,
            unet_lora_layers={k: v.half() for k, v in get_peft_model_state_dict(self.unet).items()},
            weight_name=unfinished.name,
        )
        unfinished.replace(file)


def distil(work: Distillation, batches: Iterable[Batch], *, steps: int, rate: float) -> Iterator[float]:
    """Train the LoRA on `steps` batches with AdamW, whose rate falls to 0, and yield the loss of each."""
    optimizer = torch.optim.AdamW(work.parameters, lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in islice(batches, steps):
        loss = work.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(work.parameters, 1.0)
        optimizer.step()
        falling.step()
        yield float(loss.detach())


@torch.no_grad()
def scenes(pipeline: Any, count: int) -> Latents:
    """The latents of random scenes with their captions and time ids, on the pipeline's device."""
    device, vae = pipeline.unet.device, pipeline.vae
    z, ids, times = [], [], []
    for chunk in make_all(orders("scenes", count, seed=SEED, chunk=AT_ONCE), 0):
        for levels in images_of(chunk.table, device, chunk.size).split(25):
            latents = vae.encode(levels.to(device) / 127.5 - 1).latent_dist.mode()
            z.append(latents * vae.config.scaling_factor)
        ids.append(torch.from_numpy(chunk.ids.astype("int16")))
        times.append(torch.from_numpy(chunk.time_ids))
    return Latents(torch.cat(z), torch.cat(ids).to(device), torch.cat(times).to(device))


def grain(pictures: Sequence[Image.Image]) -> float:
    """How far pixels are from the median of their 3×3 neighbours, the mean in levels of 255. What is left of noise is grainy."""
    smooth = [picture.filter(ImageFilter.MedianFilter(3)) for picture in pictures]
    return float(
        np.mean([np.abs(np.subtract(*map(_levels, pair))) for pair in zip(pictures, smooth, strict=True)])
    )


def sharpness(pictures: Sequence[Image.Image]) -> float:
    """How strong edges are: of all differences between a pixel and its right neighbour, the largest of three channels, what one
    in a hundred exceeds, the mean in levels of 255."""
    differences = (np.abs(np.diff(_levels(picture), axis=1)).max(2) for picture in pictures)
    return float(np.mean([np.quantile(one, 0.99) for one in differences]))


def _levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, float)


def judge(file: Path, count: int) -> dict[str, dict[str, float]]:
    """Pictures of `count` held-out prompts, exact, and in few steps with the LoRA and without: prompts followed, in points, grain
    and sharpness, in levels. A sheet of some of them is written next to the file."""
    os.environ["SDXL_BASE"] = str(BASE)
    painter = Painter()
    painter.tuned.pipeline.set_progress_bar_config(disable=True)
    texts, wanted = zip(*held_out_prompts(count, seed=1), strict=True)
    few = {"scheduler": "LCM", "guidance_scale": 1.0}
    ways: dict[str, tuple[list[str], dict[str, Any]]] = {
        "exact": ([], {"num_inference_steps": SOLVER_STEPS, "guidance_scale": 5.0})
    }
    for steps in STEPS:
        ways[f"{steps} steps without the LoRA"] = ([], {**few, "num_inference_steps": steps})
        ways[f"{steps} steps with the LoRA"] = ([str(file)], {**few, "num_inference_steps": steps})
    found, rows = {}, []
    for name, (loras, settings) in ways.items():
        pictures = drawn(painter, texts, FineTuneOptions(extra_lora=loras), **settings)
        kept = followed(pictures, wanted, painter.placement.device.type)
        found[name] = {
            "followed": round(100 * kept, 1),
            "grain": round(grain(pictures), 2),
            "sharpness": round(sharpness(pictures), 1),
        }
        rows.append(Row(title=name, pictures=pictures[:SHOWN]))
    contact_sheet(rows, side=200, text=20).save(file.with_suffix(".jpg"), quality=80)
    return found


def load_teacher(device: str) -> Any:
    """The miniature's pipeline in fp32."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        BASE, variant="fp16", dtype=torch.float32, add_watermarker=False
    )
    return pipeline.to(device)


def main() -> None:
    """Distil, write the LoRA, and judge it."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distil_lcm", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4, help="at 1e-3 pictures are noisy")
    parser.add_argument("--guidance", type=float, default=5.0, help="the guidance that is learned")
    parser.add_argument("--judge", type=int, default=0, help="how many held-out prompts to draw at the end")
    parser.add_argument("--output", type=Path, default=Path("runs/lcm.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    pipeline = load_teacher("cuda" if cuda else "cpu")
    bank = scenes(pipeline, args.scenes)
    work = Distillation(pipeline, rank=args.rank, guidance=args.guidance)
    losses = []
    batches = (work.batch(bank, args.batch_size) for _ in range(args.steps))
    bar = tqdm(distil(work, batches, steps=args.steps, rate=args.rate), total=args.steps)
    for loss in bar:
        losses.append(loss)
        bar.set_postfix(loss=f"{mean(losses[-100:]):.4f}")
    work.save(args.output)
    told: dict[str, Any] = {
        "loss_first": round(mean(losses[:100]), 4),
        "loss_last": round(mean(losses[-100:]), 4),
    }
    if args.judge:
        told |= judge(args.output, args.judge)
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()

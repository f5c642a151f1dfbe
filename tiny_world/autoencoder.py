"""The autoencoder stage, and the quality gate that later stages rely on."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tiny_world.bank import make_all, orders
from tiny_world.models import FULL, SMOKE, build_vae
from tiny_world.parts import pad
from tiny_world.raster import render
from tiny_world.scenes import random_scene, scene_parts
from tiny_world.sheets import save_grid
from tiny_world.subjects import random_shot, shot_parts, subject
from tiny_world.training import Run, Trainer, load_half_weights, save_half_weights

log = logging.getLogger(__name__)

SCALING_FACTOR = 0.13025
"""That of SDXL: latents have a standard deviation of 1 / SCALING_FACTOR."""

AT_ONCE = 4000
"""Pictures that the renderer draws at once. Its time goes into kernel launches, and their number hardly grows with this."""
GATE_DB = 30.0
KL_WEIGHT = 3e-5


class GateError(RuntimeError):
    """The autoencoder's reconstructions are too poor to train a base on it."""


def train_autoencoder(run: Run, *, force: bool) -> None:
    """Train the autoencoder, whiten its latents and save `vae.safetensors` in half precision with a sheet of pictures.

    Raises GateError if unseen subjects or held-out scenes stay below 30 dB, unless `force` is set.
    """
    sizes = SMOKE if run.smoke else FULL
    torch.manual_seed(1)
    vae = build_vae(sizes).to(run.device)
    trainer = Trainer(modules={"vae": vae}, run=run, peak=1e-3, warmup=100, ema_decay=0.998, weight_decay=0.0)
    trainer.resume("autoencoder")
    bank = picture_bank(run)
    if run.cuda:
        use_faster_format(vae, lambda: _loss(vae, _batch(bank, 32), run.dtype))
    batch = 2 if run.smoke else 32
    done = trainer.train(lambda: _loss(vae, _batch(bank, batch), run.dtype), stage="autoencoder")
    vae = build_vae(sizes).to(run.device)
    trainer.load_ema({"vae": vae})
    whiten(vae, scene_images(256 if not run.smoke else 4, run.device))
    save_half_weights(vae, run.fetch / "vae.safetensors")
    numbers = gate(vae, run, n=64 if not run.smoke else 2)
    _check(numbers, run, "autoencoder gate", trainer.step, done, force)


def _check(numbers: dict[str, float], run: Run, stage: str, steps: int, done: bool, force: bool) -> None:
    run.record(stage, **numbers, steps=steps, done=done)
    if done and min(numbers["subjects_db"], numbers["scenes_db"]) < GATE_DB and not force:
        raise GateError(
            f"the autoencoder stays below {GATE_DB} dB: {numbers}; train longer, or continue with --force"
        )


def train_decoder(run: Run, *, force: bool) -> None:
    """Train the decoder further and overwrite `vae.safetensors`.

    The encoder stays as it is, so latents and models trained on them stay valid. Raises GateError like
    `train_autoencoder`.
    """
    torch.manual_seed(4)
    vae = load_vae(run).train().requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        assert part is not None
        part.requires_grad_(True)
    trainer = Trainer(modules={"vae": vae}, run=run, peak=6e-4, warmup=50, ema_decay=0.998, weight_decay=0.0)
    trainer.resume("decoder")
    bank = picture_bank(run)
    batch = 2 if run.smoke else 32
    if run.cuda:
        use_faster_format(vae, lambda: _loss(vae, _batch(bank, batch), run.dtype))
    done = trainer.train(lambda: _loss(vae, _batch(bank, batch), run.dtype), stage="decoder")
    vae = load_vae(run)
    trainer.load_ema({"vae": vae})
    save_half_weights(vae, run.fetch / "vae.safetensors")
    _check(gate(vae, run, n=64 if not run.smoke else 2), run, "decoder gate", trainer.step, done, force)


def load_vae(run: Run) -> AutoencoderKL:
    """The trained autoencoder in fp32 and evaluation mode, on the run's device."""
    vae = build_vae(SMOKE if run.smoke else FULL)
    load_half_weights(vae, run.fetch / "vae.safetensors")
    vae.register_to_config(scaling_factor=SCALING_FACTOR)
    return vae.to(run.device).eval()


def use_faster_format(model: torch.nn.Module, loss_fn) -> None:
    """Move the model to the memory format with the faster forward and backward pass on this GPU."""
    seconds = {}
    for name in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=name)
        for _ in range(3):  # warm up
            loss_fn().backward()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            loss_fn().backward()
        end.record()
        torch.cuda.synchronize()
        seconds[name] = begin.elapsed_time(end) / 3
    model.zero_grad()
    best = min(seconds, key=lambda name: seconds[name])
    log.info("forward and backward in ms: %s", seconds)
    model.to(memory_format=best)


def picture_bank(run: Run) -> Tensor:
    """uint8 [N, 3, 256, 256] on the device: 60 % figures and 40 % scenes."""
    figures, scenes = (6, 4) if run.smoke else (27_000, 18_000)
    wanted = orders("figures", figures, seed=10_000) + orders("scenes", scenes, seed=20_000)
    images = [images_of(chunk.table, run.device, chunk.size) for chunk in make_all(wanted, run.workers)]
    bank = torch.cat(images)
    run.record("picture bank", pictures=len(bank))
    return bank


def images_of(table: np.ndarray, device: str, size: int = 256) -> Tensor:
    """uint8 [n, 3, 256, 256]. Smaller pictures are enlarged."""
    out = []
    for start in range(0, len(table), AT_ONCE):
        images = render(table[start : start + AT_ONCE], size=size, device=device).images
        if size != 256:
            images = F.interpolate(images, size=(256, 256), mode="bilinear", align_corners=False)
        out.append((images * 255).round().to(torch.uint8))
    return torch.cat(out)


def scene_images(n: int, device: str) -> Tensor:
    """float32 [n, 3, 256, 256] in -1..1, half scenes and half figures, for the latents' statistics."""
    chunks = make_all(orders("scenes", n // 2, seed=30_000) + orders("figures", n // 2, seed=31_000), 0)
    return torch.cat([_signed(images_of(chunk.table, device, chunk.size)) for chunk in chunks])


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _batch(bank: Tensor, n: int) -> Tensor:
    """float32 [n, 3, 256, 256] in -1..1: random pictures, randomly mirrored and with permuted colour channels."""
    device = bank.device
    x = bank[torch.randint(len(bank), (n,), device=device)]
    x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
    x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(-2), x)
    order = torch.rand(n, 3, device=device).argsort(1)
    kept = torch.rand(n, 1, device=device) < 0.7
    order = torch.where(kept, torch.arange(3, device=device), order)
    return _signed(x.gather(1, order.view(n, 3, 1, 1).expand(-1, -1, *x.shape[2:])))


def _loss(vae: AutoencoderKL, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of L1, squared error, edges (L1 of differences), coarse colours (L1 of 8x8 means) and KL.

    Each is a mean over elements.
    """
    moments = vae.encode(x.to(dtype)).latent_dist
    mean, logvar = moments.mean.float(), moments.logvar.float()
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = vae.decode(z.to(dtype)).sample.float() - x
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    coarse = F.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + 4 * (error**2).mean() + 0.3 * edges + 0.5 * coarse + KL_WEIGHT * kl


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Shift and scale each latent channel to mean 0 and standard deviation 1 / SCALING_FACTOR.

    This changes the two 1x1 convolutions only, and no reconstruction. images: [n, 3, 256, 256] in -1..1.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(16)])
    mean = latents.mean((0, 2, 3))
    factor = 1 / (latents.std((0, 2, 3)) * SCALING_FACTOR)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and post is not None and quant.bias is not None and post.bias is not None
    quant.weight[:4] *= factor.view(-1, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - mean) * factor
    quant.bias[4:] += 2 * factor.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= factor.view(1, -1, 1, 1)


@torch.no_grad()
def gate(vae: AutoencoderKL, run: Run, *, n: int) -> dict[str, float]:
    """The mean PSNR in dB of n unseen subjects (even seeds) and n held-out scenes, with half-precision weights."""
    vae = copy.deepcopy(vae).half().float().eval()
    rng = np.random.default_rng(5)
    shots = [shot_parts(random_shot("TOK", rng), {"TOK": subject(2 * i)}, seed=2 * i) for i in range(n)]
    scenes = [scene_parts(random_scene(rng, held=True), rng) for _ in range(n)]
    numbers, pairs = {}, []
    for name, pictures in (("subjects_db", shots), ("scenes_db", scenes)):
        images = render(pad(pictures), device=run.device).images
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(8)])
        again = torch.cat([vae.decode(z).sample for z in latents.split(8)]).add(1).div(2).clamp(0, 1)
        psnr = -10 * torch.log10(((again - images) ** 2).mean((1, 2, 3)).clamp_min(1e-10))
        numbers[name] = round(float(psnr.mean()), 2)
        numbers[name.replace("_db", "_worst")] = round(float(psnr.min()), 2)
        pairs += [t for pair in zip(images[:12], again[:12], strict=True) for t in pair]
    save_grid(torch.stack(pairs), run.fetch / "autoencoder.png", columns=8)
    (run.fetch / "autoencoder.json").write_text(json.dumps(numbers))
    return numbers

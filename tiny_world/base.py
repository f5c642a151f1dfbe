"""The base, toys and refiner stages: text encoders and UNet on cached latents."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiny_world.autoencoder import AT_ONCE, SCALING_FACTOR, images_of, load_vae
from tiny_world.bank import make_all, orders
from tiny_world.evaluation import sample_sheet
from tiny_world.models import FULL, SMOKE, build_text_encoders, build_unet
from tiny_world.tokens import END, START, vocabulary
from tiny_world.training import Run, Trainer, load_half_weights, save_half_weights

log = logging.getLogger(__name__)

MIN_SNR_GAMMA = 5.0
DROPOUT = 0.1
REFINER_STEPS = 300
"""The refiner trains on timesteps below this one only."""


class Latents(NamedTuple):
    """z: scaled latents, fp16 [N, 4, 32, 32]. ids: int16 [N, CAPTIONS, 77], padded with <|endoftext|>. time_ids: [N, 6]."""

    z: Tensor
    ids: Tensor
    time_ids: Tensor


def train_base(run: Run, *, stage: str = "base") -> None:
    """Train the UNet and both text encoders together, and save their EMA and sheets of samples.

    stage: "base" starts from scratch on scenes of the 16 kinds. "toys" continues on scenes with random figures: the base
        learns to place things that it has no name for, as SDXL can.
    """
    sizes = SMOKE if run.smoke else FULL
    torch.manual_seed(2 if stage == "base" else 4)
    bank = latent_bank(run, toys=stage == "toys")
    first, second = build_text_encoders(sizes)
    unet = build_unet(sizes)
    modules: dict[str, nn.Module] = {"text_encoder": first, "text_encoder_2": second, "unet": unet}
    for name, module in modules.items():
        if stage == "toys":
            load_half_weights(module, run.fetch / f"{name}.safetensors")
        module.to(run.device)
    trainer = Trainer(modules=modules, run=run, peak=1e-3, warmup=300, ema_decay=0.999)
    trainer.resume(stage)
    alphas = alphas_cumprod(run.device)
    batch = 4 if run.smoke else 512

    def loss() -> Tensor:
        z, ids, time_ids = draw(bank, batch)
        hidden, pooled = encode(first, second, ids)
        kept = (torch.rand(batch, device=run.device) >= DROPOUT).to(hidden.dtype)
        hidden, pooled = hidden * kept.view(-1, 1, 1), pooled * kept.view(-1, 1)
        return denoising_loss(unet, z, hidden, pooled, time_ids, alphas, limit=1000)

    def ema_parts() -> dict[str, nn.Module]:
        a, b = build_text_encoders(sizes)
        parts: dict[str, nn.Module] = {"text_encoder": a, "text_encoder_2": b, "unet": build_unet(sizes)}
        return {name: part.to(run.device).eval() for name, part in trainer.load_ema(parts).items()}

    def look(trainer: Trainer, *, final: bool = False) -> None:
        parts = ema_parts()
        for name, part in parts.items():
            save_half_weights(part, run.fetch / f"{name}.safetensors")
        name = stage if final else f"{stage}_{trainer.step:06d}"
        numbers = sample_sheet(run, load_vae(run), parts, name=name, n=32 if not run.smoke else 2)
        run.record(f"{stage} samples", step=trainer.step, **numbers)

    done = trainer.train(loss, stage=stage, every=look)
    look(trainer, final=done)


def train_refiner(run: Run) -> None:
    """Train the refiner's small UNet on low noise, with the base's second text encoder frozen."""
    sizes = SMOKE if run.smoke else FULL
    torch.manual_seed(3)
    bank = latent_bank(run, toys=True, scale=0.2)
    _, second = build_text_encoders(sizes)
    load_half_weights(second, run.fetch / "text_encoder_2.safetensors")
    second = second.to(run.device, run.dtype).eval().requires_grad_(False)
    unet = build_unet(sizes, refiner=True).to(run.device)
    trainer = Trainer(modules={"unet": unet}, run=run, peak=1e-3, warmup=100, ema_decay=0.998)
    trainer.resume("refiner")
    alphas = alphas_cumprod(run.device)
    batch = 4 if run.smoke else 512
    ends = vocabulary()
    empty = torch.full((77,), ends[END], device=run.device)
    empty[0] = ends[START]

    def loss() -> Tensor:
        z, ids, time_ids = draw(bank, batch)
        dropped = torch.rand(batch, 1, device=run.device) < DROPOUT
        ids = torch.where(dropped, empty, ids)
        output = second(pad_with_zero(ids), output_hidden_states=True)
        # The pipeline's aesthetic scores: 6 for a prompt, 2.5 for the negative one.
        score = torch.where(dropped, 2.5, 6.0)
        times = torch.cat([time_ids[:, :4], score], 1)
        return denoising_loss(
            unet, z, output.hidden_states[-2], output.text_embeds, times, alphas, limit=REFINER_STEPS
        )

    trainer.train(loss, stage="refiner")
    ema = build_unet(sizes, refiner=True).to(run.device)
    trainer.load_ema({"unet": ema})
    save_half_weights(ema, run.fetch / "refiner_unet.safetensors")


@torch.no_grad()
def latent_bank(run: Run, *, toys: bool, scale: float = 1.0) -> Latents:
    """Render scenes, encode them once and keep the latents on the device. toys: three in five scenes have toys."""
    total = int((8 if run.smoke else 150_000) * (scale if not run.smoke else 1))
    wanted = orders("scenes", total, seed=100_000)
    if toys:
        total = min(total, 100_000) // 5
        wanted = orders("scenes", 2 * total, seed=200_000, chunk=AT_ONCE)
        wanted += orders("toys", 3 * total, seed=300_000, chunk=AT_ONCE)
    vae = load_vae(run).to(run.dtype)
    z, ids, times = [], [], []
    for chunk in make_all(wanted, run.workers):
        for images in images_of(chunk.table, run.device, chunk.size).split(250):
            mean = vae.encode((images / 127.5 - 1).to(run.dtype)).latent_dist.mean
            z.append((mean.float() * SCALING_FACTOR).half())
        ids.append(torch.from_numpy(chunk.ids.astype("int16")))
        times.append(torch.from_numpy(chunk.time_ids))
    bank = Latents(torch.cat(z), torch.cat(ids).to(run.device), torch.cat(times).to(run.device))
    run.record("latent bank", scenes=len(bank.z), std=round(float(bank.z.float().std()), 3))
    return bank


def draw(bank: Latents, n: int) -> Latents:
    """A random batch with one random caption of each scene.

    z: float32 [n, 4, 32, 32]. ids: int64 [n, 77]. time_ids: [n, 6].
    """
    device = bank.z.device
    rows = torch.randint(len(bank.z), (n,), device=device)
    wording = torch.randint(bank.ids.shape[1], (n,), device=device)
    return Latents(bank.z[rows].float(), bank.ids[rows, wording].long(), bank.time_ids[rows])


def pad_with_zero(ids: Tensor) -> Tensor:
    """Ids [n, 77] as the second tokenizer pads them: 0 ("!") after the first <|endoftext|>."""
    end = ids == vocabulary()[END]
    return torch.where(end & (end.long().cumsum(1) > 1), 0, ids)


def encode(first: nn.Module, second: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: the penultimate hidden states of both encoders [n, 77, c1 + c2], and the second's pooled
    output."""
    a = first(ids, output_hidden_states=True).hidden_states[-2]
    b = second(pad_with_zero(ids), output_hidden_states=True)
    return torch.cat([a, b.hidden_states[-2]], -1), b.text_embeds


def alphas_cumprod(device: str) -> Tensor:
    """The cumulative alphas of SDXL's schedule. Its betas are squares of 1000 equal steps from sqrt(0.00085) to sqrt(0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def denoising_loss(
    unet: nn.Module,
    z: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    time_ids: Tensor,
    alphas: Tensor,
    *,
    limit: int,
) -> Tensor:
    """The epsilon loss with min-SNR weights (Hang et al., 2023) at uniform timesteps below `limit`."""
    n = len(z)
    t = torch.randint(limit, (n,), device=z.device)
    a = alphas[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(z)
    noisy = a.sqrt() * z + (1 - a).sqrt() * noise
    conditions = {"text_embeds": pooled, "time_ids": time_ids}
    predicted = unet(
        noisy.to(hidden.dtype), t, encoder_hidden_states=hidden, added_cond_kwargs=conditions
    ).sample
    snr = alphas[t] / (1 - alphas[t])
    weight = snr.clamp_max(MIN_SNR_GAMMA) / snr
    return (weight * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

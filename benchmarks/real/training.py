"""Checks of training: a short run on the example pictures, pictures before and after, and the LoRA in diffusers."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from benchmarks.real.drawing import PROMPT, conditioning, plain_picture, request
from benchmarks.real.findings import Notes, check
from benchmarks.real.setup import Setup, Trained, level_difference
from dataset_and_utils import TokenEmbeddingsHandler, TokenMap, read_embeddings
from sdxl.data.caption_table import read_caption_table
from sdxl.data.picture_reader import read_image
from sdxl.files.archives import unpack
from sdxl.serving.request import FineTuneOptions

if TYPE_CHECKING:
    from sdxl.training.recipe import StepReport

EXAMPLES = Path("example_datasets/crowny_1024.zip")
STEPS = {"real": 200, "miniature": 40}
MINIATURE = {"lora_targets": "all", "lora_lr": 2e-3, "ti_lr": 5e-3}
"""Rates for the miniature's 7 million UNet parameters. A real base is trained with the defaults."""
TOKEN_PROMPTS = (
    "a photo of TOK in the middle on a cyan gradient background",
    "a photo of TOK in the middle on a red background",
    "a painting of TOK in a forest",
)
LEARNED = 3
"""Training pictures whose loss is measured."""
TIMESTEPS = (200, 400, 600, 800)
SETTLED = 5
"""Steps at the start and after the pivot whose time does not count: they compile and capture."""
MOST_MEMORY = 33
"""GiB: what docs/training.md says about a LoRA at batch 4, and a tenth more."""


def train_lora(setup: Setup, **changes: Any) -> Trained:
    """Train a LoRA on the example pictures, through the entry point's own stages.

    changes: inputs of `train` that differ from the defaults.
    """
    import train
    from sdxl.declared_inputs import declared_inputs
    from sdxl.training.inputs import train_inputs

    steps = setup.steps or STEPS["miniature" if setup.is_miniature else "real"]
    inputs = {name: declared.default for name, declared in declared_inputs(train.train).items()}
    inputs |= {
        "input_images": EXAMPLES,
        "max_train_steps": steps,
        "seed": 0,
        "resolution": setup.side,
    }
    inputs |= {"random_views": 0}  # views need longer runs
    if setup.is_miniature:
        inputs |= MINIATURE
    workspace = setup.folder / "training"
    workspace.mkdir(parents=True)
    losses, ends = [], []

    def note(report: StepReport) -> None:
        losses.append(report.loss)
        ends.append(time.monotonic())

    wanted = train_inputs(inputs | changes)
    with torch.enable_grad():
        tar = train.run(wanted, workspace, on_step=note)
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    folder = setup.folder / "trained"
    unpack(tar, folder)
    pivot = round(wanted.options.pivot_fraction * len(losses))
    return Trained(tar=tar, folder=folder, losses=losses, ends=ends, pivot=pivot, peak_gib=peak)


@check("Does a short training teach the subject, and leave other prompts alone?")
def training(setup: Setup, notes: Notes) -> None:
    """Loss on the training pictures, and pictures of the same seeds, before and after."""
    trained = setup.trained
    _tell_of_run(setup, notes, trained)
    _tell_of_rows(setup, notes, trained)
    pictures, captions = example_pictures(setup)
    tuned = FineTuneOptions(replicate_weights=str(trained.tar))
    found = {}
    for name, options in (("before", FineTuneOptions()), ("after", tuned)):
        setup.painter.apply(options)
        prompts = (*TOKEN_PROMPTS, PROMPT)
        drawn = [next(iter(setup.painter.draw(request(setup, prompt), options))) for prompt in prompts]
        found[name] = (mean_loss(setup, pictures[:LEARNED], captions[:LEARNED]), drawn)
    (loss, old), (new_loss, new) = found["before"], found["after"]
    notes.expect(
        "loss on training pictures: below that of the base",
        f"below {loss:.4f}",
        f"{new_loss:.4f}",
        new_loss < loss,
    )
    *changes, drift = (level_difference(one, other) for one, other in zip(old, new, strict=True))
    notes.between("change of pictures with TOK, levels of 255", 2, 255, sum(changes) / len(changes))
    notes.fact("change of a picture without TOK, levels of 255", drift)
    for picture in pictures[:2]:
        notes.picture(picture, "training picture")
    for prompt, one, other in zip(prompts, old, new, strict=True):
        notes.picture(one, f"before: {prompt}")
        notes.picture(other, f"after: {prompt}")


@check("Does a LoRA that is written here open in diffusers, and draw the same picture?")
def lora_in_diffusers(setup: Setup, notes: Notes) -> None:
    """The files of the training in diffusers' own pipeline, next to our serving."""
    trained = setup.trained
    prompt = TOKEN_PROMPTS[0]
    tuned = FineTuneOptions(replicate_weights=str(trained.tar))
    ours, base = (
        next(iter(setup.painter.draw(request(setup, prompt), options)))
        for options in (tuned, FineTuneOptions())
    )
    precision = setup.painter.tuned.pipeline.unet.dtype
    setup.release()
    pipeline = setup.plain_pipeline(precision)
    pipeline.load_lora_weights(trained.folder, weight_name="lora.safetensors")
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    TokenEmbeddingsHandler(encoders, [pipeline.tokenizer, pipeline.tokenizer_2]).load_embeddings(
        trained.folder / "embeddings.pti"
    )
    words = TokenMap.read(trained.folder / "special_params.json")
    theirs = plain_picture(setup, pipeline, words.substitute(prompt))
    change, difference = level_difference(ours, base), level_difference(ours, theirs)
    notes.fact("change by the LoRA, levels of 255", change)
    notes.at_most(
        "difference between the two, as a share of that change", 0.2, difference / max(change, 1e-9)
    )
    notes.at_most("difference between the two, levels of 255", 4, difference)
    for picture, caption in ((base, "base"), (ours, "ours"), (theirs, "diffusers")):
        notes.picture(picture, f"{caption}: {prompt}")


def mean_loss(setup: Setup, pictures: list[Image.Image], captions: list[str]) -> float:
    """The loss of denoising on pictures, for the same noise and timesteps in every call, as serving runs the UNet."""
    tuned = setup.painter.tuned
    pipeline, schedule = tuned.pipeline, setup.base.schedule
    vae = setup.autoencoder(torch.float32)
    noises: Any = DDPMScheduler.from_config(schedule)
    generator = torch.Generator(setup.device).manual_seed(0)
    losses = []
    for picture, caption in zip(pictures, captions, strict=True):
        told = conditioning(setup, pipeline, tuned.token_map.substitute(caption))
        levels = torch.from_numpy(np.array(picture)).to(setup.device).permute(2, 0, 1)[None]
        latents = vae.encode(levels.float() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
        for timestep in TIMESTEPS:
            when = torch.tensor([timestep], device=setup.device)
            noise = torch.randn(latents.shape, generator=generator, device=setup.device)
            is_v = noises.config.prediction_type == "v_prediction"
            target = noises.get_velocity(latents, noise, when) if is_v else noise
            predicted = pipeline.unet(
                noises.add_noise(latents, noise, when).to(pipeline.unet.dtype),
                when[0],
                encoder_hidden_states=told.embeds,
                added_cond_kwargs={"text_embeds": told.pooled, "time_ids": told.time_ids},
                return_dict=False,
            )[0]
            losses.append(float((predicted.float() - target).square().mean()))
    return sum(losses) / len(losses)


def example_pictures(setup: Setup) -> tuple[list[Image.Image], list[str]]:
    """The example pictures at the size that is trained, and their captions."""
    folder = setup.folder / "examples"
    unpack(EXAMPLES, folder)
    rows, size = read_caption_table(folder / "captions.csv"), (setup.side, setup.side)
    pictures = [read_image(folder / row.file)[0].convert("RGB") for row in rows]
    return [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures], [
        row.caption for row in rows
    ]


def _tell_of_run(setup: Setup, notes: Notes, trained: Trained) -> None:
    seconds = [after - before for before, after in pairwise(trained.ends)]
    notes.fact("steps", len(trained.losses))
    for what, times in (
        ("before", seconds[SETTLED : trained.pivot - 1]),
        ("after", seconds[trained.pivot + SETTLED :]),
    ):
        if times:
            notes.fact(f"seconds for a step {what} the pivot", median(times))
    finite = all(np.isfinite(trained.losses))
    notes.expect("all losses are finite", "yes", "yes" if finite else "no", finite)
    notes.fact("size of lora.safetensors, MB", (trained.folder / "lora.safetensors").stat().st_size / 1e6)
    if trained.peak_gib is not None:
        applies = setup.is_sdxl and setup.side == 1024
        notes.at_most("GPU memory of the training, GiB", MOST_MEMORY, trained.peak_gib, applies=applies)


def _tell_of_rows(setup: Setup, notes: Notes, trained: Trained) -> None:
    pipeline = setup.painter.tuned.pipeline
    rows, at_eos = read_embeddings(trained.folder / "embeddings.pti")
    notes.equal("token rows are marked as pooled at the end of the text", True, at_eos)
    for name, row in zip(("text_encoder", "text_encoder_2"), rows, strict=True):
        table = getattr(pipeline, name).get_input_embeddings().weight.detach().float()
        notes.between(
            f"{name}: spread of token rows, as a share of the table's",
            0.5,
            2,
            float(row.float().std() / table.std()),
        )

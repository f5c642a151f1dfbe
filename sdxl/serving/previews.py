"""Draw with the parts of a training, and the weights that they have at that moment.

Knows how training holds an SDXL (`Components`) and how serving draws; does not know why pictures are wanted. An entry
point hands `drawer` to a training, which never imports serving.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dataset_and_utils import TokenMap
from sdxl.data.helper_models import lent
from sdxl.history import Previews
from sdxl.model.components import Components
from sdxl.serving.conditioning import Prompts, for_base
from sdxl.serving.denoising import Conditioning, begin, course, denoise, noise_like
from sdxl.serving.generation import decode, generate
from sdxl.serving.request import MULTIPLE, GenerationRequest
from sdxl.serving.samplers import make_scheduler
from sdxl.serving.shallow_unet import ReusingUNet
from sdxl.serving.shortcuts import Call
from sdxl.speed.autocast import autocast
from sdxl.speed.compiled_blocks import uncompiled

SAMPLER = "K_EULER"
STEPS, GUIDANCE = 8, 5.0
"""How previews are drawn: fast rather than fine."""
SHALLOW = (4, 6)
"""The steps, from 0, that take deep features from the step before. Pictures differ by two levels of 255 at most, on average."""


def drawer(components: Components, token_map: TokenMap | None = None) -> Callable[..., Image.Image]:
    """A function `draw(prompt, *, side, steps, guidance, seed)` that draws one square picture.

    It uses the parts of `components` themselves, without a copy: every call draws with their current weights. The text
    encoders must be on the same device as the UNet.

    token_map: the tokens that prompts may name; by default none.
    """
    pipeline = _pipeline(components)
    tokens = token_map or TokenMap({})

    def draw(prompt: str, *, side: int, steps: int, guidance: float, seed: int) -> Image.Image:
        request = GenerationRequest(
            prompt=prompt,
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=guidance,
            scheduler=SAMPLER,
            seed=seed,
            prompt_weights=False,  # captions are plain text, as training reads them
        )
        # Training holds some parts in fp32 and others in bf16; autocast lets them work together.
        with autocast(components.device):
            return generate(pipeline, request, tokens)[0]

    return draw


def preview_prompts(captions: Sequence[str], token_map: TokenMap, word: str = "") -> list[str]:
    """What previews show if the user does not say: a caption, then the subject in another place and style.

    The last prompt names no new token, so its picture should not change.

    word: what the base calls the subject, if it is known.
    """
    names = list(token_map.placeholders)
    thing = " and ".join(names[:2])
    return [
        captions[0],
        f"a photo of {thing} on a beach",
        f"a pencil drawing of {thing}",
        f"a photo of a {word or 'dog'} on a beach",
    ]


class PreviewDrawer:
    """Draws all prompts with the present weights of a training, into files in a folder, from the same noise each time."""

    def __init__(
        self,
        components: Components,
        token_map: TokenMap,
        prompts: Sequence[str],
        folder: Path,
        *,
        side: int,
        seed: int,
        at_once: int,
    ) -> None:
        """Draw with the parts of `components` themselves.

        prompts: plain text; they may name tokens of the map.
        at_once: most pictures in one call of the UNet.
        """
        self._components, self._token_map, self._prompts = components, token_map, prompts
        self._folder, self._side, self._seed, self._at_once = folder, side, seed, at_once
        self._pipeline = _pipeline(components)
        self._read: list[Conditioning] | None = None
        """What the text encoders say of the prompts; None while they train."""

    @torch.no_grad()
    def freeze_text(self) -> None:
        """Read the prompts for the last time, because the text encoders are about to leave the device."""
        with autocast(self._components.device):
            self._read = self._conditionings()

    @torch.no_grad()
    def __call__(self, step: int) -> Previews:
        """Draw the previews after `step`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = []
        device = self._components.device
        with autocast(device), uncompiled(), lent(self._components.vae, device):
            read = self._read or self._conditionings()
            for some in _batches(read, self._at_once):
                for picture in self._drawn(Conditioning.joined(some)):
                    names.append(f"{self._folder.name}/step-{step:06d}-{len(names)}.jpg")
                    picture.save(self._folder.parent / names[-1], quality=90)
        return Previews(step=step, pictures=names)

    def _conditionings(self) -> list[Conditioning]:
        """The conditioning of each prompt."""
        return [
            for_base(
                self._pipeline,
                Prompts(
                    prompt=prompt,
                    negative_prompt="",
                    token_map=self._token_map,
                    guidance_scale=GUIDANCE,
                    guidance_rescale=0.0,
                    count=1,
                    size=(self._side, self._side),
                    device=self._components.device,
                ),
            )
            for prompt in self._prompts
        ]

    def _drawn(self, conditioning: Conditioning) -> Iterator[Image.Image]:
        """A picture for each prompt of `conditioning`. All have the same noise, so that only the prompts differ."""
        device, count = self._components.device, len(conditioning.embeds) // 2
        scheduler: Any = make_scheduler(SAMPLER, self._pipeline)
        scheduler.set_timesteps(STEPS, device=device)
        planned = course(scheduler, 0, STEPS)
        generators = [torch.Generator(device).manual_seed(self._seed) for _ in range(count)]
        shape = (count, 4, self._side // MULTIPLE, self._side // MULTIPLE)
        noise = noise_like(torch.empty(shape, device=device, dtype=conditioning.embeds.dtype), generators)
        latents = denoise(
            ReusingUNet(self._components.unet),
            scheduler,
            planned,
            begin(scheduler, planned, None, noise),
            conditioning,
            generators=generators,
            calls=[Call(features="reuse" if step in SHALLOW else "keep") for step in range(STEPS)],
        )
        return decode(self._pipeline, latents)


def preview_side(resolution: int) -> int:
    """The side of previews in pixels: smaller than `resolution` where that saves time, but not so small that SDXL fails."""
    return min(resolution, max(512, resolution * 3 // 4 // 64 * 64))


def _pipeline(components: Components) -> Any:
    """The parts of `components` as serving takes them."""
    from diffusers import StableDiffusionXLPipeline  # here: importing it takes a second

    pipeline = StableDiffusionXLPipeline(
        vae=components.vae,
        text_encoder=components.text_encoders[0],
        text_encoder_2=components.text_encoders[1],
        tokenizer=components.tokenizers[0],
        tokenizer_2=components.tokenizers[1],
        unet=components.unet,
        scheduler=components.noise_scheduler,  # type: ignore[arg-type]
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _batches(conditionings: Sequence[Conditioning], most: int) -> Iterator[list[Conditioning]]:
    """Up to `most` neighbours with equally many chunks at once."""
    for _, alike in groupby(conditionings, key=lambda one: one.embeds.shape):
        together = list(alike)
        for start in range(0, len(together), most):
            yield together[start : start + most]

"""Draw with the parts of a training, and the weights that they have at that moment.

Knows how training holds an SDXL (`Components`) and how serving draws; does not know why pictures are wanted. An entry
point hands `drawer` to a training, which never imports serving.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from dataset_and_utils import TokenMap
from sdxl.history import Previews
from sdxl.model.components import Components
from sdxl.serving.generation import generate
from sdxl.serving.request import GenerationRequest
from sdxl.speed.autocast import autocast

SAMPLER = "K_EULER"
STEPS, GUIDANCE = 8, 5.0
"""How previews are drawn: fast rather than fine."""


def drawer(components: Components, token_map: TokenMap | None = None) -> Callable[..., Image.Image]:
    """A function `draw(prompt, *, side, steps, guidance, seed)` that draws one square picture.

    It uses the parts of `components` themselves, without a copy: every call draws with their current weights. The text
    encoders must be on the same device as the UNet.

    token_map: the tokens that prompts may name; by default none.
    """
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


def preview_drawer(
    components: Components, token_map: TokenMap, prompts: Sequence[str], folder: Path, *, side: int, seed: int
) -> Callable[[int], Previews]:
    """A function `draw(step)` that draws all `prompts` with the present weights, into files in `folder`.

    Every call starts from the same noise. Parts that have left the device come back for as long as they are needed.
    """
    draw = drawer(components, token_map)

    def previews(step: int) -> Previews:
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        with _on_device(components), torch.compiler.set_stance("force_eager"):
            for number, prompt in enumerate(prompts):
                picture = draw(prompt, side=side, steps=STEPS, guidance=GUIDANCE, seed=seed)
                names.append(f"{folder.name}/step-{step:06d}-{number}.jpg")
                picture.save(folder.parent / names[-1], quality=90)
        return Previews(step=step, pictures=names)

    return previews


def preview_side(resolution: int) -> int:
    """The side of previews in pixels: smaller than `resolution` where that saves time, but not so small that SDXL fails."""
    return min(resolution, max(512, resolution * 3 // 4 // 64 * 64))


@contextmanager
def _on_device(components: Components) -> Iterator[None]:
    """While the context lasts, the autoencoder and the text encoders are on the UNet's device."""
    parts = [components.vae, *components.text_encoders]
    before = [part.device for part in parts]  # type: ignore[union-attr]
    try:
        for part in parts:
            part.to(components.device)  # type: ignore[union-attr]
        yield
    finally:
        for part, device in zip(parts, before, strict=True):
            part.to(device)  # type: ignore[union-attr]

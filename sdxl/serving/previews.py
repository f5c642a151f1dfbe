"""Draw with the parts of a training, and the weights that they have at that moment.

Knows how training holds an SDXL (`Components`) and how serving draws; does not know why pictures are wanted. An entry
point hands `drawer` to a training, which never imports serving.
"""

from collections.abc import Callable

from PIL import Image

from dataset_and_utils import TokenMap
from sdxl.model.components import Components
from sdxl.serving.generation import generate
from sdxl.serving.request import GenerationRequest
from sdxl.speed.autocast import autocast

SAMPLER = "K_EULER"


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
        )
        # Training holds some parts in fp32 and others in bf16; autocast lets them work together.
        with autocast(components.device):
            return generate(pipeline, request, tokens)[0]

    return draw

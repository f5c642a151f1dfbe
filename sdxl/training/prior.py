"""Prior preservation: pictures that the base itself draws, learnt beside the subject's so that it goes on drawing them.

Source: DreamBooth (arXiv:2208.12242), section 3.3. Knows the base's parts and where the pictures are kept; does not know
the loss.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from tqdm import tqdm

from sdxl.data.dataset_folder import write_captions
from sdxl.data.framing import Framing
from sdxl.errors import UserInputError
from sdxl.model.components import Components
from sdxl.settings import cache_folder

log = logging.getLogger(__name__)

SEPARATOR = "|"


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """What is drawn, and how."""

    base: str
    """Folder or hub name of the base model."""
    prompts: tuple[str, ...]
    """In turn, one for each picture."""
    images: int
    """How many pictures, at least 1."""
    resolution: int
    """Their side, in pixels."""
    steps: int = 25
    """Sampling steps."""
    guidance: float = 5.0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserInputError("prior_prompts names no prompt: write some, such as 'a photo of a dog'.")
        if self.images < 1:
            raise UserInputError(f"prior_images is {self.images}, but must be 1 or more, such as 100.")

    @classmethod
    def parse(cls, text: str, **settings: Any) -> "PriorConfig":
        """Prompts separated by |."""
        prompts = tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())
        return cls(prompts=prompts, **settings)


def prior_dataset(config: PriorConfig, components: Components) -> Path:
    """The dataset folder of the prior's pictures: from the cache, else drawn by `components` as they are, the base.

    The folder appears in the cache when it is complete.
    """
    key = hashlib.sha256(json.dumps(asdict(config)).encode()).hexdigest()[:16]
    folder = cache_folder() / "prior" / key
    if folder.is_dir():
        log.info("The prior's %d pictures come from %s", config.images, folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    try:
        _draw(config, components, partial)
        try:
            partial.replace(folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@torch.no_grad()
def _draw(config: PriorConfig, components: Components, folder: Path) -> None:
    from diffusers import (
        StableDiffusionXLPipeline,
    )  # here: it takes a second, and warns before logging is configured

    pipeline = StableDiffusionXLPipeline(
        vae=components.vae,
        text_encoder=components.text_encoders[0],
        text_encoder_2=components.text_encoders[1],
        tokenizer=components.tokenizers[0],
        tokenizer_2=components.tokenizers[1],
        unet=components.unet,
        scheduler=EulerDiscreteScheduler.from_config(components.noise_scheduler.config),  # type: ignore[arg-type]
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    side = config.resolution
    captions: dict[str, str] = {}
    on_gpu = components.device.type == "cuda"
    for index in tqdm(range(config.images), desc="Drawing the prior", unit="picture"):
        prompt = config.prompts[index % len(config.prompts)]
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            output: Any = pipeline(
                prompt=prompt,
                width=side,
                height=side,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=torch.Generator().manual_seed(index),
                output_type="latent",
            )
        latents = output.images.to(components.vae.dtype) / components.vae.config["scaling_factor"]
        decoded = components.vae.decode(latents).sample  # type: ignore[union-attr]
        pictures: Any = pipeline.image_processor.postprocess(decoded)
        pictures[0].save(folder / f"{index}.src.png")
        captions[f"{index}.src.png"] = prompt
    whole = Framing(original_size=(side, side), crop_top_left=(0, 0), target_size=(side, side))
    write_captions(folder / "captions.csv", captions, [whole] * len(captions))

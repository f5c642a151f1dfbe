"""Write captions of pictures with an image-to-text model such as BLIP (arXiv:2201.12086).

Knows pictures and the beginnings of captions; does not know files or captions that already exist.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image

from sdxl.data.caption_text import join_caption
from sdxl.data.helper_models import load_part, loaded
from sdxl.errors import WeightsError
from sdxl.files.hub import CAPTIONER


class Captioner:
    """A loaded captioning model."""

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    def caption(self, image: Image.Image, prefix: str) -> str:
        """A caption that begins with exactly `prefix` and continues with what the model sees.

        Tokens in the prefix appear only once. Equal pictures get equal captions: beam search with three beams, no
        sampling.
        """
        device = next(self.model.parameters()).device
        inputs = self.processor(images=image.convert("RGB"), text=prefix, return_tensors="pt").to(device)
        ids = self.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=40)
        written = self.processor.batch_decode(ids, skip_special_tokens=True)[0]
        return join_caption(prefix, written)


@contextmanager
def captioner() -> Iterator[Captioner]:
    """The captioner; its memory is freed at the end of the block.

    Raises:
        DownloadError, WeightsError: the model cannot be fetched or loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = load_part(CAPTIONER, AutoProcessor.from_pretrained, backend="pil")
    if getattr(processor, "chat_template", None):
        raise WeightsError(
            f"{CAPTIONER.purpose} expects instructions and cannot continue a caption: name a model such as BLIP in "
            f"{CAPTIONER.setting}."
        )
    with loaded(CAPTIONER, AutoModelForImageTextToText) as model:
        yield Captioner(model, processor)

"""Prior preservation: the base draws pictures, and training learns them together with the subject's.

So the fine-tune does not forget how to draw them.

Source: DreamBooth (arXiv:2208.12242), section 3.3. Knows which pictures are wanted and where they are kept; does not know
how they are drawn, nor the loss.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from sdxl.data.dataset_folder import TABLE, picture_file, write_captions
from sdxl.data.framing import Framing
from sdxl.errors import UserInputError
from sdxl.settings import cache_folder
from sdxl.training.config import prompts_of

log = logging.getLogger(__name__)


class Draw(Protocol):
    """Draws one picture of `prompt`, `side` × `side` pixels."""

    def __call__(self, prompt: str, *, side: int, steps: int, guidance: float, seed: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Which pictures are drawn, and how. Its values are the key of the cache."""

    base: str
    """What identifies the base, whatever its name is."""
    prompts: tuple[str, ...]
    """Used in turn, one for each picture."""
    images: int
    """How many pictures, at least 1."""
    resolution: int
    """Side of the pictures in pixels."""
    steps: int = 25
    """Sampling steps."""
    guidance: float = 5.0
    """Scale of classifier-free guidance."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserInputError(f"prior_images is {self.images}, but must be 1 or more, such as 100.")

    @classmethod
    def parse(cls, text: str, **settings: Any) -> "PriorConfig":
        """`text` holds the prompts, separated by |.

        Raises:
            UserInputError: there is no prompt in the text, or a setting is wrong.
        """
        return cls(prompts=prompts_of(text), **settings)


def prior_dataset(config: PriorConfig, draw: Draw) -> Path:
    """The dataset folder of the prior's pictures: from the cache, else drawn by `draw` with the base's weights.

    The folder appears in the cache only when it is complete.
    """
    key = hashlib.sha256(json.dumps(asdict(config)).encode()).hexdigest()[:16]
    folder = cache_folder() / "prior" / key
    if folder.is_dir():
        log.info("The base has drawn the prior's %d pictures before; they are in %s.", config.images, folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    try:
        _fill(partial, config, draw)
        try:
            partial.replace(folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fill(folder: Path, config: PriorConfig, draw: Draw) -> None:
    captions: dict[str, str] = {}
    for index in tqdm(range(config.images), desc="Drawing the prior", unit="picture"):
        prompt = config.prompts[index % len(config.prompts)]
        picture = draw(
            prompt, side=config.resolution, steps=config.steps, guidance=config.guidance, seed=index
        )
        file = picture_file(folder, index)
        picture.save(file)
        captions[file.name] = prompt
    size = (config.resolution, config.resolution)
    whole = Framing(original_size=size, crop_top_left=(0, 0), target_size=size)
    write_captions(folder / TABLE, captions, [whole] * len(captions))

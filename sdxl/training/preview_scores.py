"""How good previews are, told by models that look at the pictures: DINOv2 says how like the training pictures they are, and
CLIP how well they show their prompts.

Knows prompts, training pictures and the models; does not know when previews are drawn. The scores are told and choose nothing.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from torch import Tensor

from dataset_and_utils import TokenMap
from sdxl import settings
from sdxl.data.dataset_folder import PreparedPicture
from sdxl.data.picture_encoders import PictureEncoders, as_tensor, cosine_of_different, picture_encoders
from sdxl.files.hub import CLIP, DINO, is_here
from sdxl.history import History, Previews
from sdxl.training.config import TrainingConfig

log = logging.getLogger(__name__)

_MOST_PICTURES = 32
"""Training pictures that previews are compared with, evenly over all."""


class PreviewScorer:
    """Scores the previews whose prompts name a new token."""

    def __init__(
        self,
        encoders: PictureEncoders,
        prompts: Sequence[str],
        pictures: Sequence[PreparedPicture],
        token_map: TokenMap,
        *,
        token_init: str,
        folder: Path,
        device: torch.device,
    ) -> None:
        """Look at the training pictures and read the prompts.

        prompts: what previews show, in their order.
        token_init: the words of new tokens, such as "TOK:dog". CLIP reads these in place of the tokens, or nothing.
        folder: what the files of previews are relative to.
        device: where the models compute; between two calls they are on the CPU.
        """
        self._encoders, self._folder, self._device = encoders, folder, device
        texts = {number: in_words(prompts[number], token_map, token_init) for number in range(len(prompts))}
        self._numbers = [number for number, prompt in enumerate(prompts) if token_map.named_in(prompt)]
        self._read = [number for number in self._numbers if texts[number]]
        few = pictures[:: -(-len(pictures) // _MOST_PICTURES)]
        captions = [picture.caption for picture in few]
        with encoders.on(device):
            self._pictures = encoders.likeness(_opened(picture.picture) for picture in few)
            self._texts = encoders.texts([texts[number] for number in self._read] or [""])
        self._like = [_same_subject(prompts[number], captions, token_map) for number in self._numbers]
        """For each of `_numbers`, the training pictures that its preview is compared with."""

    @property
    def among_pictures(self) -> float | None:
        """How alike the training pictures are, on the scale of the likeness of previews; None for a single picture."""
        several = [self._pictures[rows] for rows in self._like if len(rows) > 1]
        return mean(cosine_of_different(one, one) for one in several) if several else None

    def __call__(self, previews: Previews) -> Previews:
        """`previews` with their scores."""
        if not self._numbers:
            return previews
        drawn = {number: _opened(self._folder / previews.pictures[number]) for number in self._numbers}
        with self._encoders.on(self._device):
            vectors = self._encoders.likeness(drawn.values())
            shown = self._encoders.shown(drawn[number] for number in self._read) if self._read else None
        alike = [
            float((vector @ self._pictures[rows].T).mean())
            for vector, rows in zip(vectors, self._like, strict=True)
        ]
        told = replace(
            previews,
            likeness=mean(alike),
            prompt_shown=None if shown is None else float((shown * self._texts).sum(1).mean()),
        )
        log.info("The previews after step %d: %s.", told.step, self._in_words(told))
        return told

    def _in_words(self, told: Previews) -> str:
        among = self.among_pictures
        compared = "" if among is None else f" (training pictures among themselves: {among:.3f})"
        shown = "" if told.prompt_shown is None else f", prompts shown {told.prompt_shown:.3f}"
        return f"likeness {told.likeness:.3f}{compared}{shown}"


def preview_scorer(
    config: TrainingConfig,
    history: History,
    pictures: Sequence[PreparedPicture],
    *,
    folder: Path,
    device: torch.device,
) -> PreviewScorer | None:
    """The scorer that `SDXL_SCORER` asks for; None if it asks for none, or if the models are not here or fail.

    It scores previews of the history's prompts, and the history learns how alike the training pictures are. Whatever goes
    wrong is told, and stops no training.

    folder, device: see `PreviewScorer`.
    """
    try:
        wanted = settings.scorer()
        if wanted == "none":
            return None
        if wanted == "auto" and not (is_here(DINO) and is_here(CLIP)):
            log.info(
                "Previews are not scored, because DINOv2 and CLIP are not on this machine: SDXL_SCORER=fetch fetches them "
                "once (700 MB)."
            )
            return None
        scorer = PreviewScorer(
            picture_encoders(),
            history.prompts,
            pictures,
            TokenMap.parse(config.token_map),
            token_init=config.token_init,
            folder=folder,
            device=device,
        )
    except Exception as error:
        log.warning("Previews are not scored: %s", error)
        return None
    history.likeness_among_pictures = scorer.among_pictures
    return scorer


def in_words(prompt: str, token_map: TokenMap, token_init: str) -> str:
    """A prompt as other models read it: with the words of `token_init` in place of new tokens, or nothing."""
    words = token_map.parse_init(token_init)
    plain = {name: words.get(f"{rows.split('>')[0]}>", " ") for name, rows in token_map.placeholders.items()}
    return " ".join(TokenMap(plain).substitute(prompt).split())


def _same_subject(prompt: str, captions: Sequence[str], token_map: TokenMap) -> list[int]:
    """The captions that name a token which the prompt names too; all, if none does."""
    single = [TokenMap({name: rows}) for name, rows in token_map.placeholders.items()]
    named = [one for one in single if one.named_in(prompt)]
    rows = [row for row, caption in enumerate(captions) if any(one.named_in(caption) for one in named)]
    return rows or list(range(len(captions)))


def _opened(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return as_tensor(picture)

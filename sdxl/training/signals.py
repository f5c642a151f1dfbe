"""How good a fine-tune is at one moment, told by the UNet's own predictions: no other model and no drawn picture is needed.

All noise is fixed, so that moments can be compared. Knows SDXL's parts and examples; does not know what is done with the
numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dataset_and_utils import ExampleDataset, TokenMap
from sdxl.model.components import Components
from sdxl.model.prompt_chunks import token_ids
from sdxl.speed.autocast import autocast
from sdxl.speed.compiled_blocks import uncompiled
from sdxl.training.diffusion import training_target
from sdxl.training.text_conditioning import TextConditioning, read_captions

BANDS = {"low": 0.15, "middle": 0.45, "high": 0.75}
"""Band of noise → the timestep that stands for it, as a share of all."""
_DRIFT_AT, _ANSWERS_AT = 0.6, 0.9
"""Where drift and answers are measured. Texts decide most where there is much noise."""
MOST_TEXTS = 4


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What `Meter.read` finds."""

    held_out: dict[str, float]
    """Band → loss on what training does not see, divided by the base's. Below 1 the subject is learned."""
    followed: float
    """How much of the base's answer to another text is left when the text names the new tokens, 0 to 1. A fine-tune that
    draws its pictures whatever the prompt says is near 0."""
    drift: float
    """How far predictions for texts without new tokens have moved, as a share of what the text itself changes in them."""


class Meter:
    """Reads the signals of the UNet in `components`. Made before anything trains, because it keeps the base's predictions."""

    def __init__(
        self,
        components: Components,
        held_out: ExampleDataset,
        token_map: TokenMap,
        *,
        words: str,
        texts: Sequence[str],
        seed: int,
        mixed_precision: bool,
        at_once: int,
    ) -> None:
        """Compute what the base predicts.

        held_out: examples that training does not see, all of one shape.
        words: the words of new tokens, such as "TOK:dog"; the base answers with these in place of the tokens.
        texts: what is asked for beside the subject, at least two; they name no new token.
        at_once: most pictures in one call of the UNet.
        """
        self._components, self._mixed, self._at_once = components, mixed_precision, at_once
        self._device = components.device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._held = held_out.collate(range(len(held_out)))
        texts = texts[:MOST_TEXTS]
        token = next(iter(token_map.placeholders))
        word = dict(pair.split(":") for pair in words.split(",") if pair).get(token)
        plain = [f"{word}, {text}" if word else text for text in texts]
        self._asked = self._ids([f"{token}, {text}" for text in texts], token_map)
        self._others = self._encoded(self._ids(texts, TokenMap({})))
        self._noise = self._random(self._held.latents.shape)
        self._last: tuple[TextConditioning, TextConditioning] | None = None

        texts_of_base = self._encoded(self._held.token_ids), self._encoded(self._ids(plain, TokenMap({})))
        self._base_losses, base_answers, self._base_others = self._read(*texts_of_base)
        self._base_answers = _centred(base_answers)

    def freeze_text(self) -> None:
        """Read the texts for the last time, because the text encoders are about to leave the device."""
        self._last = self._texts()

    def read(self) -> Signals:
        """The signals of the present weights."""
        losses, answers, others = self._read(*(self._last or self._texts()))
        expected = self._base_answers
        followed = (_centred(answers) * expected).sum() / expected.square().sum().clamp_min(1e-12)
        moved, scale = others - self._base_others, _centred(self._base_others)
        drift = (moved.square().sum() / scale.square().sum().clamp_min(1e-12)).sqrt()
        return Signals(
            held_out={band: losses[band] / self._base_losses[band] for band in BANDS},
            followed=float(followed.clamp(0, 1)),
            drift=float(drift),
        )

    def _texts(self) -> tuple[TextConditioning, TextConditioning]:
        """The captions of what is held out, and the new token with each of the texts."""
        return self._encoded(self._held.token_ids), self._encoded(self._asked)

    def _ids(self, texts: Sequence[str], token_map: TokenMap) -> tuple[Tensor, Tensor]:
        rows = token_ids(texts, self._components.tokenizers, token_map)
        first, second = (torch.stack(ids).to(self._device) for ids in zip(*rows, strict=True))
        return first, second

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator, device=self._device)

    @torch.no_grad()
    def _encoded(self, ids: tuple[Tensor, Tensor]) -> TextConditioning:
        with autocast(self._device):
            return read_captions(self._components.text_encoders, ids)

    def _read(
        self, captions: TextConditioning, asked: TextConditioning
    ) -> tuple[dict[str, float], Tensor, Tensor]:
        """The losses of what is held out by band, and what is predicted for the texts `asked` and for the others."""
        scheduler, count = self._components.noise_scheduler, len(self._held.latents)
        rows = torch.arange(count, device=self._device).repeat(len(BANDS))
        every, noise = self._held.take(rows), self._noise[rows]
        times = self._times(list(BANDS.values()), count)
        noisy = scheduler.add_noise(every.latents, noise, times)  # type: ignore[arg-type]
        of_held = _Question(noisy, times, captions.take(rows), every.time_ids)
        of_asked, of_others = self._about(asked, _ANSWERS_AT), self._about(self._others, _DRIFT_AT)
        predicted, answers, others = self._answers([of_held, of_asked, of_others])

        target = training_target(scheduler, every.latents, noise, times)
        errors = ((predicted - target).square() * every.mask).chunk(len(BANDS))
        whole = self._held.mask.sum().clamp_min(1e-6)
        losses = {band: float(error.sum() / whole) + 1e-12 for band, error in zip(BANDS, errors, strict=True)}
        return losses, answers, others

    def _about(self, texts: TextConditioning, share: float) -> "_Question":
        """The first held-out example with noise, under each of the texts."""
        count = len(texts.pooled)
        several = self._held.take(torch.zeros(count, dtype=torch.long, device=self._device))
        times, noise = self._times([share], count), self._noise[:1].expand(count, -1, -1, -1)
        noisy = self._components.noise_scheduler.add_noise(several.latents, noise, times)  # type: ignore[arg-type]
        return _Question(noisy, times, texts, several.time_ids)

    def _times(self, shares: Sequence[float], count: int) -> Tensor:
        """Timesteps [len(shares) · count]: each of the shares of all timesteps `count` times."""
        steps = self._components.noise_scheduler.config["num_train_timesteps"]
        times = torch.tensor([int(share * steps) for share in shares], device=self._device)
        return times.repeat_interleave(count)

    @torch.no_grad()
    def _answers(self, questions: "Sequence[_Question]") -> list[Tensor]:
        """The UNet's predictions for each question, as many rows at once as memory for training leaves room for."""
        if len({one.texts.hidden.shape[1] for one in questions}) > 1:  # captions of several chunks
            return [answer for one in questions for answer in self._answers([one])]
        noisy, times, time_ids = (
            torch.cat([getattr(one, name) for one in questions]) for name in ("noisy", "times", "time_ids")
        )
        texts = TextConditioning.joined([one.texts for one in questions])
        unet, rows = self._components.unet, []
        with uncompiled(), autocast(self._device, self._mixed):
            for some in torch.arange(len(noisy), device=self._device).split(self._at_once):
                told = texts.take(some).for_unet(time_ids[some], unet.dtype)
                rows.append(unet(noisy[some].to(unet.dtype), times[some], **told).sample.float())
        return list(torch.cat(rows).split([len(one.noisy) for one in questions]))


class _Question(NamedTuple):
    """What the UNet is asked about."""

    noisy: Tensor
    """Latents with noise [n, c, h, w]."""
    times: Tensor
    """Their timesteps [n]."""
    texts: TextConditioning
    time_ids: Tensor


def _centred(predictions: Tensor) -> Tensor:
    """What differs between texts: predictions [texts, …] without their mean over the texts."""
    return predictions - predictions.mean(0, keepdim=True)

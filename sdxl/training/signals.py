"""How good a fine-tune is at one moment, told by the UNet's own predictions: no other model and no drawn picture is needed.

All noise is fixed, so that moments can be compared. Knows SDXL's parts and examples; does not know what is done with the
numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset_and_utils import Example, ExampleDataset, TokenMap
from sdxl.model.components import Components
from sdxl.model.prompt_chunks import token_ids
from sdxl.speed.autocast import autocast
from sdxl.training.diffusion import training_target
from sdxl.training.text_conditioning import TextConditioning, read_captions

BANDS = {"low": 0.15, "middle": 0.45, "high": 0.75}
"""Band of noise → the timestep that stands for it, as a share of all."""
_DRIFT_AT = (0.4, 0.8)
_ANSWERS_AT = (0.9,)
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
    ) -> None:
        """Compute what the base predicts.

        held_out: examples that training does not see, all of one shape.
        words: the words of new tokens, such as "TOK:dog"; the base answers with these in place of the tokens.
        texts: what is asked for beside the subject, at least two; they name no new token.
        """
        self._components, self._mixed = components, mixed_precision
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

        self._base_losses = self._losses(self._encoded(self._held.token_ids))
        self._base_others = self._predicted(self._others, _DRIFT_AT)
        self._base_answers = _centred(
            self._predicted(self._encoded(self._ids(plain, TokenMap({}))), _ANSWERS_AT)
        )

    def freeze_text(self) -> None:
        """Read the texts for the last time, because the text encoders are about to leave the device."""
        self._last = self._texts()

    def read(self) -> Signals:
        """The signals of the present weights."""
        captions, asked = self._last or self._texts()
        losses = self._losses(captions)
        answers = _centred(self._predicted(asked, _ANSWERS_AT))
        expected = self._base_answers
        followed = (answers * expected).sum() / expected.square().sum().clamp_min(1e-12)
        moved = self._predicted(self._others, _DRIFT_AT) - self._base_others
        scale = _centred(self._base_others)
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

    def _losses(self, captions: TextConditioning) -> dict[str, float]:
        """The mean squared error of the held-out examples in each band."""
        scheduler = self._components.noise_scheduler
        losses = {}
        for band, share in BANDS.items():
            times = self._times(share, len(self._held.latents))
            noisy = scheduler.add_noise(self._held.latents, self._noise, times)  # type: ignore[arg-type]
            target = training_target(scheduler, self._held.latents, self._noise, times)
            error = (self._call(noisy, times, captions, self._held) - target).square() * self._held.mask
            losses[band] = float(error.sum() / self._held.mask.sum().clamp_min(1e-6)) + 1e-12
        return losses

    def _predicted(self, texts: TextConditioning, shares: Sequence[float]) -> Tensor:
        """Predictions [timesteps, texts, c, h, w] for the first held-out example, with noise, under each of the texts."""
        scheduler = self._components.noise_scheduler
        first, count = self._held.take(torch.tensor([0], device=self._device)), len(texts.pooled)
        several = first.take(torch.zeros(count, dtype=torch.long, device=self._device))
        found = []
        for share in shares:
            times = self._times(share, count)
            noise = self._noise[:1].expand(count, -1, -1, -1)
            noisy = scheduler.add_noise(several.latents, noise, times)  # type: ignore[arg-type]
            found.append(self._call(noisy, times, texts, several))
        return torch.stack(found)

    def _times(self, share: float, count: int) -> Tensor:
        steps = self._components.noise_scheduler.config["num_train_timesteps"]
        return torch.full((count,), int(share * steps), device=self._device)

    @torch.no_grad()
    def _call(self, noisy: Tensor, times: Tensor, texts: TextConditioning, like: Example) -> Tensor:
        """The UNet's predictions, one picture at a time so that memory for training stays free."""
        unet = self._components.unet
        rows = []
        # Compiled blocks would compile anew for these shapes and for calls without gradients.
        with torch.compiler.set_stance("force_eager"), autocast(self._device, self._mixed):
            for row in range(len(noisy)):
                one = slice(row, row + 1)
                added = {"text_embeds": texts.pooled[one].to(unet.dtype), "time_ids": like.time_ids[one]}
                hidden = texts.hidden[one].to(unet.dtype)
                told = {"encoder_hidden_states": hidden, "added_cond_kwargs": added}
                rows.append(unet(noisy[one].to(unet.dtype), times[one], **told).sample.float())
        return torch.cat(rows)


def _centred(predictions: Tensor) -> Tensor:
    """What differs between texts: predictions [timesteps, texts, …] without their mean over the texts."""
    return predictions - predictions.mean(1, keepdim=True)

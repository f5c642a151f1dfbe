"""Captions as the text encoders read them: for the UNet that trains, and for the base where it teaches.

Knows text encoders and their LoRA; does not know batches or losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl.model.prompt_chunks import encode


@dataclass(frozen=True, kw_only=True)
class TextConditioning:
    """What text encoders make of b captions."""

    hidden: Tensor
    """Hidden states [b, t, d]."""
    pooled: Tensor
    """Pooled captions [b, d]."""
    of_base: "TextConditioning | None" = None
    """The same captions as the base's own text encoders read them; None if these read them alike."""

    def take(self, rows: Tensor) -> "TextConditioning":
        """The captions at `rows` [b], an integer tensor on their device."""
        base = None if self.of_base is None else self.of_base.take(rows)
        return TextConditioning(hidden=self.hidden[rows], pooled=self.pooled[rows], of_base=base)

    def for_unet(self, time_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The UNet's arguments beside noisy latents and timesteps: the captions in `dtype`, and the size conditioning [b, 6]."""
        added = {"text_embeds": self.pooled.to(dtype), "time_ids": time_ids}
        return {"encoder_hidden_states": self.hidden.to(dtype), "added_cond_kwargs": added}

    def dropped(self, share: float, generator: torch.Generator) -> "TextConditioning":
        """The same with about a `share` (0 to 1) of the captions replaced by zeros, SDXL's unconditional branch."""
        if not share:
            return self
        kept = torch.rand(len(self.pooled), generator=generator, device=generator.device) >= share
        return self._times(kept)

    def _times(self, kept: Tensor) -> "TextConditioning":
        base = None if self.of_base is None else self.of_base._times(kept)
        hidden, pooled = self.hidden * kept[:, None, None], self.pooled * kept[:, None]
        return TextConditioning(hidden=hidden, pooled=pooled, of_base=base)

    @staticmethod
    def joined(parts: "Sequence[TextConditioning]") -> "TextConditioning":
        """Several as one, in their order. All or none have the base's reading."""
        bases = [part.of_base for part in parts if part.of_base is not None]
        return TextConditioning(
            hidden=torch.cat([part.hidden for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
            of_base=TextConditioning.joined(bases) if bases else None,
        )


def read_captions(
    text_encoders: Sequence[Any], token_ids: tuple[Tensor, Tensor], *, also_as_base: bool = False
) -> TextConditioning:
    """Encode token ids 2×[b, 77·n].

    also_as_base: without the LoRA of the text encoders too, and without gradients. New tokens keep their present rows.
    """
    of_base = None
    if also_as_base:
        with torch.no_grad(), _without_lora(text_encoders):
            hidden, pooled = encode(text_encoders, token_ids)
        of_base = TextConditioning(hidden=hidden, pooled=pooled)
    hidden, pooled = encode(text_encoders, token_ids)
    return TextConditioning(hidden=hidden, pooled=pooled, of_base=of_base)


@contextmanager
def _without_lora(text_encoders: Sequence[Any]) -> Iterator[None]:
    """While the context lasts, the text encoders are the base's. Afterwards all of their LoRA matrices take gradients."""
    for encoder in text_encoders:
        encoder.disable_adapters()
    try:
        yield
    finally:
        for encoder in text_encoders:
            encoder.enable_adapters()

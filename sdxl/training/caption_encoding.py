"""Captions → text conditioning, once for all steps in which the text encoders no longer change.

Knows text encoders and batches; does not know losses or optimizers.
"""

import torch

from sdxl.model.components import Components
from sdxl.speed.autocast import autocast
from sdxl.training.batches import Batches
from sdxl.training.diffusion import encode_prompt


@torch.no_grad()
def encode_captions(components: Components, batches: Batches) -> None:
    """Store the text conditioning of every example in the buckets of `batches`.

    Each distinct caption is encoded once, one by one: all views of a picture share it.
    """
    for bucket in batches.buckets:
        distinct, which = torch.cat(bucket.examples.token_ids, 1).unique(dim=0, return_inverse=True)
        with autocast(components.device):
            encoded = [
                encode_prompt(components.text_encoders, (first, second))
                for first, second in (row.chunk(2, 1) for row in distinct.split(1))
            ]
        hidden, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        bucket.prompts = hidden[which], pooled[which]

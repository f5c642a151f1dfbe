"""Captions → text conditioning, once for all steps in which the text encoders no longer change.

Knows text encoders and batches; does not know losses or optimizers.
"""

import torch

from sdxl.model.components import Components
from sdxl.model.prompt_chunks import encode
from sdxl.speed.autocast import autocast
from sdxl.training.batches import Batches


@torch.no_grad()
def encode_captions(components: Components, batches: Batches) -> None:
    """Store the text conditioning of every example in the buckets of `batches`.

    Each distinct caption is encoded and kept once, one by one: all views of a picture share it.
    """
    for bucket in batches.buckets:
        distinct, bucket.prompt_of = torch.cat(bucket.examples.token_ids, 1).unique(
            dim=0, return_inverse=True
        )
        with autocast(components.device):
            encoded = [
                encode(components.text_encoders, (first, second))
                for first, second in (row.chunk(2, 1) for row in distinct.split(1))
            ]
        hidden, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        bucket.prompts = hidden, pooled

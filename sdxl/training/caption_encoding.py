"""Captions → text conditioning, once for all steps in which the text encoders no longer change.

Knows text encoders and batches; does not know losses or optimizers.
"""

from collections.abc import Sequence

import torch

from sdxl.model.components import Components
from sdxl.speed.autocast import autocast
from sdxl.training.batches import Batches
from sdxl.training.text_conditioning import TextConditioning, read_captions


@torch.no_grad()
def encode_captions(
    components: Components, sources: Sequence[Batches], *, also_as_base: bool = False
) -> None:
    """Store the text conditioning of every example of `sources` in their buckets, unless it is there.

    Each distinct caption is encoded and kept once, one by one: all views of a picture share it.

    also_as_base: see `read_captions`.
    """
    buckets = [bucket for batches in sources for bucket in batches.buckets if bucket.captions is None]
    for bucket in buckets:
        both = torch.cat(bucket.examples.token_ids, 1)
        distinct, bucket.caption_of = both.unique(dim=0, return_inverse=True)
        with autocast(components.device):
            encoded = [
                read_captions(components.text_encoders, (first, second), also_as_base=also_as_base)
                for first, second in (row.chunk(2, 1) for row in distinct.split(1))
            ]
        bucket.captions = TextConditioning.joined(encoded)

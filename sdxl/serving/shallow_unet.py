"""Call a UNet whole and keep its deep features, or run only its outermost blocks with features that were kept.

Between neighbouring steps the features of the lower resolutions hardly change (DeepCache, arXiv:2312.00858). In SDXL the
blocks of the full resolution have no attention and take 7 % of the arithmetic.

Knows diffusers' UNet; does not know when which call is good enough.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl.serving.shortcuts import Features


class ReusingUNet:
    """Called like the UNet, with one more argument. It does not change the UNet's modules.

    Kept features stay at one address as long as their shape does, so that CUDA graphs can write and read them.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet: Any = unet
        self._deep: Tensor | None = None
        """What the last block up takes from the one before [rows, channels, h, w]."""

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
        features: Features = "none",
    ) -> tuple[Tensor]:
        """The prediction [rows, 4, h, w] for `sample` [rows, 4, h, w].

        features: with "reuse", the last call that kept features had a `sample` of this shape.
        """
        if features == "reuse":
            return (self._shallow(sample, timestep, encoder_hidden_states, added_cond_kwargs),)
        with self._keeping(features == "keep"):
            return self.unet(
                sample,
                timestep,
                encoder_hidden_states=encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
                return_dict=False,
            )

    @contextmanager
    def _keeping(self, wanted: bool) -> Iterator[None]:
        """In this context calls of the UNet keep their deep features, if `wanted`."""
        if not wanted:
            yield
            return
        hook = self.unet.up_blocks[-1].register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, _block: Any, _positional: tuple, given: dict[str, Any]) -> None:
        deep = given["hidden_states"]
        if self._deep is None or (self._deep.shape, self._deep.dtype) != (deep.shape, deep.dtype):
            self._deep = torch.empty_like(deep)
        self._deep.copy_(deep)

    def _shallow(
        self, sample: Tensor, timestep: Tensor, embeds: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor:
        """What `UNet2DConditionModel.forward` does, without all between the outermost blocks."""
        unet, deep = self.unet, self._deep
        assert deep is not None and len(deep) == len(sample), "a whole call of this shape comes first"
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        assert not hasattr(first, "attentions") and not hasattr(last, "attentions"), "not an SDXL"

        times = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        times = times + unet.get_aug_embed(
            emb=times, encoder_hidden_states=embeds, added_cond_kwargs=added_cond_kwargs
        )
        hidden = unet.conv_in(sample)
        skipped = [hidden]
        for block in first.resnets:
            hidden = block(hidden, times)
            skipped.append(hidden)
        hidden = last(hidden_states=deep, temb=times, res_hidden_states_tuple=tuple(skipped))
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))

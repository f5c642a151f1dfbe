"""Calls a UNet for drawing, so that a step is never CPU-bound.

On a GPU, each kind and shape of call is captured once as a CUDA graph and then replayed. The warm-up compiles kernels that serve
all shapes. The kinds are those of `shallow_unet`: whole calls, with or without keeping deep features, and shallow ones.
Fine-tunes change weights in place, so that graphs stay valid. Knows UNets and shapes; does not know requests.

| `SDXL_SPEED` | how the UNet is called                                                             |
|--------------|------------------------------------------------------------------------------------|
| compiled     | a graph of compiled blocks                                                         |
| fp8          | like compiled, with the linear layers of transformer blocks in 8-bit floats        |
| graphs       | a graph, not compiled                                                              |
| eager        | kernels are launched one by one, as diffusers does; for debugging                  |
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl import settings
from sdxl.serving.encoder_runner import EncoderRunner
from sdxl.serving.placement import Placement
from sdxl.serving.prompt_cache import PromptCache
from sdxl.serving.shallow_unet import ReusingUNet
from sdxl.serving.shortcuts import Features
from sdxl.settings import Speed
from sdxl.speed.compiled_blocks import compile_blocks, fuse_blocks
from sdxl.speed.cuda_graphs import GraphedWork
from sdxl.speed.fp8 import Fp8Layers, is_supported
from sdxl.speed.triton_here import triton_runs

log = logging.getLogger(__name__)

MOST_SHAPES = 12
"""Most shapes of call to keep as graphs. One more drops them all, and each is captured again when it comes up."""


def speed_here(placement: Placement) -> Speed:
    """The speed that `SDXL_SPEED` names if the whole pipeline stays on a GPU, else "eager"."""
    setting = settings.speed()
    if setting == "fp8" and placement.device.type == "cuda" and not is_supported(placement.device):
        log.warning("This GPU does not support fp8: using SDXL_SPEED=compiled.")
        setting = "compiled"
    if setting in ("compiled", "fp8") and placement.device.type == "cuda":
        setting = setting if not torch.cuda.is_available() or triton_runs() else "graphs"
    return setting if placement.device.type == "cuda" and not placement.offloaded else "eager"


@dataclass(kw_only=True)
class _Inputs:
    """The input tensors of one shape of call. Their addresses are fixed in the graph; each call overwrites them."""

    tensors: dict[str, Tensor]
    cached: list[Tensor]
    """Keys and values of cross-attention for the prompt."""
    prompt: Tensor | None
    """The hidden states, compared by identity, from which `cached` was computed; None if it is out of date."""
    unet: ReusingUNet
    """The UNet, with the deep features of this shape."""


class UNetRunner:
    """Called like the UNet; calls of one shape may differ only in the values of their tensors."""

    def __init__(self, unet: UNet2DConditionModel, speed: Speed) -> None:
        """`unet` must stay on its device, and its weights at their addresses."""
        self.unet, self.speed = unet, speed
        self.compiling = False
        """Whether to compile what is not compiled yet. Only the warm-up does: compiling would stall a request."""
        self._inputs: dict[tuple, _Inputs] = {}
        self._prompts = PromptCache(unet)
        self._eager = ReusingUNet(unet)
        if speed != "eager":
            fuse_blocks(unet)
        self._graphs = GraphedWork(unet.device, enabled=speed != "eager", at_once=True)
        self._fp8 = Fp8Layers(unet, except_layers=self._prompts.layers) if speed == "fp8" else None
        if self.compiles:
            compile_blocks(unet, dynamic=True)

    @property
    def compiles(self) -> bool:
        """Whether this speed compiles."""
        return self.speed in ("compiled", "fp8")

    def forget(self) -> None:
        """Drop all graphs, their inputs and the features that were kept."""
        self._inputs.clear()
        self._eager = ReusingUNet(self.unet)
        self._graphs.forget()

    def weights_changed(self) -> None:
        """Drop what depends on the weights; call it after each switch of fine-tunes."""
        for inputs in self._inputs.values():
            inputs.prompt = None
        if self._fp8 is not None:
            self._fp8.refresh()

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
        """The prediction [b, 4, h, w] for `sample` [b, 4, h, w], in a new tensor.

        timestep: one number, on the device of `sample`.
        encoder_hidden_states: if it is the same tensor object as in the last call, its values must be the same too.
        features: with "reuse", the last call that kept features was of this shape.
        """
        given = {
            "sample": sample,
            "timestep": timestep.float(),  # samplers use integer or float timesteps: one graph serves both
            "embeds": encoder_hidden_states,
            **added_cond_kwargs,
        }
        if self.speed == "eager":
            return (_call(self._eager, given, features),)

        # Copy the inputs to the addresses that the graph of this shape reads.
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in given.items())
        inputs = self._inputs.get(key) or self._add(key, given)
        for name, value in given.items():
            inputs.tensors[name].copy_(value)

        # All steps of a picture pass the same prompt tensor: compute its keys and values in the first step only.
        if inputs.prompt is not encoder_hidden_states:
            for cached, value in zip(
                inputs.cached, self._prompts.compute(encoder_hidden_states), strict=True
            ):
                cached.copy_(value)
            inputs.prompt = encoder_hidden_states

        # The next replay overwrites the graph's output, so return a copy.
        return (self._graphs((features, key), lambda: self._work(inputs, features)).clone(),)

    def _add(self, key: tuple, given: dict[str, Tensor]) -> _Inputs:
        """Make the input tensors of a new shape."""
        if len(self._inputs) >= MOST_SHAPES:
            self.forget()
        self._inputs[key] = _Inputs(
            tensors={name: value.clone() for name, value in given.items()},
            cached=self._prompts.compute(given["embeds"]),
            prompt=given["embeds"],
            unet=ReusingUNet(self.unet),
        )
        return self._inputs[key]

    def _work(self, inputs: _Inputs, features: Features) -> Tensor:
        """The work that is captured for a kind and shape of call."""
        stance = nullcontext() if self.compiling else torch.compiler.set_stance("eager_on_recompile")
        with stance, self._prompts.returning(inputs.cached):
            return _call(inputs.unet, inputs.tensors, features)


def _call(unet: ReusingUNet, given: dict[str, Tensor], features: Features) -> Tensor:
    extra = {name: value for name, value in given.items() if name in ("text_embeds", "time_ids")}
    return unet(
        given["sample"],
        given["timestep"],
        encoder_hidden_states=given["embeds"],
        added_cond_kwargs=extra,
        features=features,
    )[0]


class Runners:
    """The runner of each UNet that draws, the base's and the refiner's, and of the text encoders."""

    def __init__(self, speed: Speed, device: torch.device) -> None:
        self.speed: Speed = speed
        self.encoders = EncoderRunner(device, enabled=speed != "eager")
        self._followed = 0
        self._runners: dict[int, UNetRunner] = {}

    def __call__(self, unet: UNet2DConditionModel) -> UNetRunner:
        """What to call instead of `unet`. A UNet that was not warmed up gets graphs without compiling."""
        return self._get(unet, "eager" if self.speed == "eager" else "graphs")

    def _get(self, unet: UNet2DConditionModel, speed: Speed) -> UNetRunner:
        """The runner of `unet`; a new one is made for `speed`."""
        if id(unet) not in self._runners:
            self._runners[id(unet)] = UNetRunner(unet, speed)
        return self._runners[id(unet)]

    def follow(self, changes: int) -> None:
        """Update the runners' caches if the weights may have changed.

        changes: `TunedPipeline.changes`. A count is marked as done only when every runner has followed, so that an
            interrupted update is repeated.
        """
        if changes != self._followed:
            for runner in self._runners.values():
                runner.weights_changed()
            self._followed = changes

    def forget(self) -> None:
        """Give up the memory of all graphs. Each is captured again when its shape comes up."""
        for runner in self._runners.values():
            runner.forget()
        self.encoders.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def warming(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """In this context `unet` is compiled."""
        runner = self._get(unet, self.speed)
        runner.compiling = runner.compiles
        try:
            yield
        finally:
            runner.compiling = False

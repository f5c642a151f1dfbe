"""Calls of a UNet for drawing, without the CPU in the way.

On a GPU every shape of call is captured once as a CUDA graph and replayed; common shapes are compiled before. Weights
that change in place, as fine-tunes do, need nothing made again. Knows UNets and shapes; does not know requests.

| `SDXL_SPEED` | what a call is                                                                     |
|--------------|------------------------------------------------------------------------------------|
| compiled     | a graph of compiled blocks for warmed shapes, without compiling for all others     |
| fp8          | as compiled, the transformer blocks' linear layers in 8-bit floating point          |
| graphs       | a graph without compiling                                                          |
| eager        | kernels launched one by one, as diffusers does: for debugging                      |
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl import settings
from sdxl.serving.placement import Placement
from sdxl.serving.prompt_cache import PromptCache
from sdxl.settings import Speed
from sdxl.speed.compiled_blocks import compile_blocks, fuse_blocks
from sdxl.speed.cuda_graphs import GraphedWork
from sdxl.speed.fp8 import Fp8Layers, is_supported

log = logging.getLogger(__name__)

MOST_SHAPES = 12
"""Shapes of call that are kept as graphs; beyond, all are dropped and made again as they come."""


def speed_here(placement: Placement) -> Speed:
    """What `SDXL_SPEED` says where all of the pipeline stays on a GPU; else always "eager"."""
    setting = settings.speed()
    if setting == "fp8" and placement.device.type == "cuda" and not is_supported(placement.device):
        log.warning("This GPU does not multiply in fp8: SDXL_SPEED is taken for compiled.")
        setting = "compiled"
    return setting if placement.device.type == "cuda" and not placement.offloaded else "eager"


@dataclass(kw_only=True)
class _Inputs:
    """Where the calls of one shape find what they are given; overwritten in place."""

    tensors: dict[str, Tensor]
    known: list[Tensor]
    """What cross-attention makes of the prompt."""
    prompt: Tensor | None
    """The hidden states that `known` was made of, the very tensor; None where it must be made again."""


class UNetRunner:
    """Called as the UNet is, with tensors of which only the values differ from call to call of one shape."""

    def __init__(self, unet: UNet2DConditionModel, speed: Speed) -> None:
        """`unet` must stay where it is, and its weights at their addresses."""
        self.unet, self.speed = unet, speed
        self.compiling = False
        """Whether shapes that come for the first time are compiled: never in a request, which it would stall."""
        self._compiled: set[tuple] = set()
        self._inputs: dict[tuple, _Inputs] = {}
        self._prompts = PromptCache(unet)
        if speed != "eager":
            fuse_blocks(unet)
        self._graphs = GraphedWork(unet.device, enabled=speed != "eager")
        self._fp8 = Fp8Layers(unet, besides=self._prompts.layers) if speed == "fp8" else None
        if self.compiles:
            compile_blocks(unet)

    @property
    def compiles(self) -> bool:
        """Whether warmed shapes are compiled."""
        return self.speed in ("compiled", "fp8")

    def weights_changed(self) -> None:
        """To be called after a fine-tune has come or gone."""
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
    ) -> tuple[Tensor]:
        """The prediction for `sample` [b, 4, h, w] at `timestep` (one number on the sample's device), as a tensor of its
        own. Hidden states that are the very tensor of the last call must not have changed."""
        given = {
            "sample": sample,
            "timestep": timestep.float(),  # samplers have whole numbers or broken ones: one graph for both
            "embeds": encoder_hidden_states,
            **added_cond_kwargs,
        }
        if self.speed == "eager":
            return (self._call(given),)
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in given.items())
        inputs = self._inputs.get(key) or self._add(key, given)
        for name, value in given.items():
            inputs.tensors[name].copy_(value)
        if inputs.prompt is not encoder_hidden_states:
            for known, value in zip(inputs.known, self._prompts.compute(encoder_hidden_states), strict=True):
                known.copy_(value)
            inputs.prompt = encoder_hidden_states
        return (self._graphs(key, lambda: self._work(key, inputs)).clone(),)

    def _add(self, key: tuple, given: dict[str, Tensor]) -> _Inputs:
        if len(self._inputs) >= MOST_SHAPES:
            self._inputs.clear()
            self._graphs.forget()
        if self.compiling:
            self._compiled.add(key)
        self._inputs[key] = _Inputs(
            tensors={name: value.clone() for name, value in given.items()},
            known=self._prompts.compute(given["embeds"]),
            prompt=given["embeds"],
        )
        return self._inputs[key]

    def _work(self, key: tuple, inputs: _Inputs) -> Tensor:
        """What is captured for a shape."""
        plainly = nullcontext() if key in self._compiled else torch.compiler.set_stance("force_eager")
        with plainly, self._prompts.known(inputs.known):
            return self._call(inputs.tensors)

    def _call(self, given: dict[str, Tensor]) -> Tensor:
        extra = {name: value for name, value in given.items() if name in ("text_embeds", "time_ids")}
        return self.unet(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=given["embeds"],
            added_cond_kwargs=extra,
            return_dict=False,
        )[0]


class Runners:
    """The runner of each UNet that draws: the base's and the refiner's."""

    def __init__(self, speed: Speed) -> None:
        self.speed: Speed = speed
        self._followed = 0
        self._runners: dict[int, UNetRunner] = {}

    def __call__(self, unet: UNet2DConditionModel) -> UNetRunner:
        """What to call in the place of `unet`; one that was never warmed is not made ready to be compiled."""
        return self._get(unet, "eager" if self.speed == "eager" else "graphs")

    def _get(self, unet: UNet2DConditionModel, speed: Speed) -> UNetRunner:
        """The runner of `unet`, made for `speed` where there is none yet."""
        if id(unet) not in self._runners:
            self._runners[id(unet)] = UNetRunner(unet, speed)
        return self._runners[id(unet)]

    def follow(self, changes: int) -> None:
        """Make anew what was made of weights, unless that was done, to its end, for this count of `TunedPipeline.changes`."""
        if changes != self._followed:
            for runner in self._runners.values():
                runner.weights_changed()
            self._followed = changes

    @contextmanager
    def warming(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """Shapes that come for the first time inside are compiled."""
        runner = self._get(unet, self.speed)
        runner.compiling = runner.compiles
        try:
            yield
        finally:
            runner.compiling = False

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

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl.compiled_blocks import compile_blocks, fuse_blocks
from sdxl.config import Speed, speed_setting
from sdxl.cuda_graphs import GraphedWork
from sdxl.fp8 import Fp8Layers, is_supported
from sdxl.placement import Placement
from sdxl.prompt_cache import PromptCache

log = logging.getLogger(__name__)

MOST_SHAPES = 12
"""Shapes of call that are kept as graphs; beyond, all are dropped and made again as they come."""


def speed_here(placement: Placement) -> Speed:
    """What `SDXL_SPEED` says where all of the pipeline stays on a GPU; else always "eager"."""
    setting = speed_setting()
    if setting == "fp8" and placement.device.type == "cuda" and not is_supported(placement.device):
        log.warning("This GPU does not multiply in fp8: SDXL_SPEED is taken for compiled.")
        setting = "compiled"
    return setting if placement.device.type == "cuda" and not placement.offloaded else "eager"


class UNetRunner:
    """Called as the UNet is, with tensors of which only the values differ from call to call of one shape."""

    def __init__(self, unet: UNet2DConditionModel, speed: Speed) -> None:
        """`unet` must stay where it is, and its weights at their addresses."""
        self.unet, self.speed = unet, speed
        self.compiling = False
        """Whether shapes that come for the first time are compiled: never in a request, which it would stall."""
        self._compiled: set[tuple] = set()
        self._inputs: dict[tuple, dict[str, Tensor]] = {}
        self._prompts = PromptCache(unet)
        self._known: dict[tuple, list[Tensor]] = {}
        """What cross-attention makes of the prompt of each shape's last call."""
        self._asked: dict[tuple, Tensor] = {}
        """That prompt's hidden states, as they were given."""
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
        self._asked.clear()
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
        if key not in self._inputs:
            self._add(key, given)
        for name, value in given.items():
            self._inputs[key][name].copy_(value)
        if self._asked.get(key) is not encoder_hidden_states:
            for known, value in zip(
                self._known[key], self._prompts.compute(encoder_hidden_states), strict=True
            ):
                known.copy_(value)
            self._asked[key] = encoder_hidden_states
        if self._graphs.holds(key):
            return (self._graphs(key, lambda: self._call(self._inputs[key])).clone(),)
        plainly = nullcontext() if key in self._compiled else torch.compiler.set_stance("force_eager")
        with plainly, self._prompts.known(self._known[key]):
            return (self._graphs(key, lambda: self._call(self._inputs[key])).clone(),)

    def _add(self, key: tuple, given: dict[str, Tensor]) -> None:
        if len(self._inputs) >= MOST_SHAPES:
            self._inputs.clear()
            self._known.clear()
            self._asked.clear()
            self._graphs.forget()
        self._inputs[key] = {name: value.clone() for name, value in given.items()}
        self._known[key] = self._prompts.compute(given["embeds"])
        self._asked[key] = given["embeds"]
        if self.compiling:
            self._compiled.add(key)

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
        self._runners: dict[int, UNetRunner] = {}

    def __call__(self, unet: UNet2DConditionModel) -> UNetRunner:
        """What to call in the place of `unet`; one that was never warmed is not made ready to be compiled."""
        if id(unet) not in self._runners:
            self._runners[id(unet)] = UNetRunner(unet, "eager" if self.speed == "eager" else "graphs")
        return self._runners[id(unet)]

    def weights_changed(self) -> None:
        """To be called after a fine-tune has come or gone."""
        for runner in self._runners.values():
            runner.weights_changed()

    @contextmanager
    def warming(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """Shapes that come for the first time inside are compiled."""
        if id(unet) not in self._runners:
            self._runners[id(unet)] = UNetRunner(unet, self.speed)
        runner = self._runners[id(unet)]
        runner.compiling = runner.compiles
        try:
            yield
        finally:
            runner.compiling = False

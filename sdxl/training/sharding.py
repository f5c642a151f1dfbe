"""Full training with a shared UNet: each process holds an equal part of its weights, gradients and optimizer state.

FSDP2 gathers the weights of a block just before it computes, and hands each process its part of the block's mean gradient.
Optimizers see only the parts, as plain tensors. Knows which weights are shared and how parts become whole; does not know
optimizers, losses or memory.

Sources: ZeRO (arXiv:1910.02054), stage 3; PyTorch FSDP (arXiv:2304.11277).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sdxl.training.data_parallel import rank, world_size

_ENOUGH = 0.9
"""The share of all weights that must be shareable. SDXL's are, except for biases and norms, among 2, 4, 5, 8, 10, 16 …"""


def can_share(unet: nn.Module) -> bool:
    """Whether the processes that train together can share the UNet equally."""
    shared = sum(p.numel() for p in unet.parameters() if _is_shareable(p))
    return world_size() > 1 and shared > _ENOUGH * sum(p.numel() for p in unet.parameters())


def share(unet: UNet2DConditionModel) -> "Shards":
    """Share a UNet that all processes hold whole. Afterwards all must call it together, also without gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Biases, norms and the few rows of the last layer stay whole everywhere: an empty part would be a case of its own.
    alone = {p for p in unet.parameters() if not _is_shareable(p)}
    for p in unet.parameters():
        p.data = p.data.contiguous()  # convolutions may lie in another order, which FSDP does not take
    mesh = init_device_mesh(unet.device.type, (world_size(),))
    for module in _units(unet):
        # Whole weights never outlive a call: they would be old when the next one comes.
        fully_shard(module, mesh=mesh, ignored_params=alone, reshard_after_forward=True)
    return Shards(unet)


class Shards:
    """The parts of a shared UNet that this process trains."""

    def __init__(self, unet: nn.Module) -> None:
        self._held = list(unet.parameters())
        self.parameters = [nn.Parameter(_part(p)) if _is_shared(p) else p for p in self._held]
        """In the order of the UNet's parameters: this process's part [rows / processes, …], or the whole of what is not
        shared. They have the memory of the UNet's parameters."""
        self.is_part = [_is_shared(p) for p in self._held]

    def collect(self) -> list[Tensor]:
        """Take the gradients over from the UNet. Returns those of whole parameters, which are still to be averaged."""
        for held, own in self._parts():
            if held.grad is not None:
                own.grad, held.grad = _part(held.grad), None
        whole = zip(self.parameters, self.is_part, strict=True)
        return [p.grad for p, is_part in whole if not is_part and p.grad is not None]

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients down to `max_norm`, and return their norm over all processes before."""
        kinds = list(zip(self.parameters, self.is_part, strict=True))
        of_parts, of_whole = (
            nn.utils.get_total_norm(
                [p.grad for p, is_part in kinds if is_part is kind and p.grad is not None]
            )
            for kind in (True, False)
        )
        squared = of_parts.square()
        dist.all_reduce(squared)
        norm = (squared + of_whole.square()).sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm

    def _parts(self) -> Iterator[tuple[Any, nn.Parameter]]:
        """Each shared parameter as the UNet holds it, and this process's part of it."""
        triples = zip(self._held, self.parameters, self.is_part, strict=True)
        return ((held, own) for held, own, is_part in triples if is_part)


def whole(tensor: Tensor) -> Tensor:
    """A weight of a UNet, shared or not, as a whole. All processes must ask together."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def set_whole(weight: Tensor, value: Tensor) -> None:
    """Set a weight of a UNet, shared or not, to the whole `value`, which all processes have."""
    if _is_shared(weight):
        _part(weight).copy_(part_of(value))
    else:
        weight.copy_(value)


def part_of(tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor: equally many rows as each other has."""
    return tensor.chunk(world_size())[rank()]


def joined(part: Tensor) -> Tensor:
    """The whole tensor of which each process has a part [rows / processes, …], in all of them."""
    found = torch.empty(len(part) * world_size(), *part.shape[1:], dtype=part.dtype, device=part.device)
    into, own = (one.view(-1).view(torch.uint8) for one in (found, part.contiguous()))  # any type can be sent
    dist.all_gather(list(into.chunk(world_size())), own)
    return found


def _units(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    """The modules whose weights are gathered at once, inner ones first. They hold compiled blocks, and are not compiled."""
    yield from (module for module in unet.modules() if isinstance(module, Transformer2DModel))
    yield from unet.down_blocks
    if unet.mid_block is not None:
        yield unet.mid_block
    yield from unet.up_blocks
    yield unet


def _is_shareable(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and len(parameter) % world_size() == 0


def _is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _part(shared: Any) -> Tensor:
    """This process's part of a shared tensor, in its own memory."""
    return shared.to_local().detach()

"""What several processes do with one model: means over them, and parameters in shards (FSDP2)."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from linearize_kernels.equation import LinearAttention
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from linearize_cli.errors import UserError


def process_mean(value: Tensor) -> Tensor:
    """The mean of a value over all processes, without gradient; the value itself where there is one process.

    What a loss divides by goes through it: then the mean of the processes' losses, and of their gradients, is
    that of the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def full(tree: Any) -> Any:
    """Whole tensors in the place of sharded ones, in dicts and lists of any depth. All processes must call it."""
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full(value) for value in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter of its shape is. All processes must call it with the same one."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def sharded(module: nn.Module, device: torch.device, **policy: Any) -> nn.Module:
    """A copy of a module whose parameters are spread over all processes; the module itself stays as it is.

    The units are the entries of the outermost module lists, which are a model's layers whatever a family calls
    them, and the root. A linear attention is a unit of its own, because in transfer the gradient reaches it
    alone. Configs are shared with the module, so that a switch of attention reaches both.

    Args:
        device: where the shards are; at most one unit is whole there while it is copied.
        policy: further arguments of `fully_shard`.

    Raises:
        UserError: layers share a parameter that is trained.
    """
    memo = {id(p): p for p in module.parameters()}
    memo |= {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    copied = copy.deepcopy(module, memo)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    attentions = [part for part in copied.modules() if isinstance(part, LinearAttention)]
    seen: set[nn.Parameter] = set()
    for unit in (*attentions, *layers(copied), copied):
        seen |= own(unit, device, seen)
        fully_shard(unit, mesh=mesh, **policy)
    return copied


def layers(module: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in layers(child)]


def own(unit: nn.Module, device: torch.device, seen: set[nn.Parameter]) -> set[nn.Parameter]:
    """Give a unit copies of the parameters that are not sharded yet, tied ones once; returns what was copied."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for part in unit.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                continue
            if parameter in seen and parameter.requires_grad:
                raise UserError(
                    f"{type(part).__name__}.{name} is shared between layers, so it cannot be trained in shards",
                    "Run on one process, or without fsdp_config.",
                )
            if parameter not in copies:
                data = parameter.detach().to(device, copy=True)
                copies[parameter] = nn.Parameter(data, parameter.requires_grad)
            part.register_parameter(name, copies[parameter])
    return set(copies)

"""Operations on several processes: means, and sharded parameters (FSDP2)."""

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
    """Return the mean of a tensor over all processes, without gradient. With one process, return it
    unchanged.

    It is used for the number of tokens that a loss is divided by. The mean of the processes' losses, and of
    their gradients, is then that of the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def full(tree: Any) -> Any:
    """Gather the sharded tensors in dicts and lists of any depth. Return other values unchanged. All
    processes must call it.
    """
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full(value) for value in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor sharded like a parameter of the same shape. All processes must call it with the same
    tensor.

    If the parameter is not sharded or has another shape, return the tensor unchanged.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def sharded(module: nn.Module, device: torch.device, **policy: Any) -> nn.Module:
    """Return a copy of a module whose parameters are sharded over all processes. The module itself is
    unchanged.

    FSDP gathers the parameters unit by unit. The units are the layers of the model (the entries of the
    outermost module lists) and the root. A linear attention is a unit of its own, because in transfer the
    gradient reaches nothing else. The copy shares its config objects with the module, so that a switch of the
    attention implementation reaches both.

    Args:
        device: the device of the shards. At most one whole unit is on it while the module is copied.
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
    """Return the layers of a model: the entries of its outermost module lists."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in layers(child)]


def own(unit: nn.Module, device: torch.device, seen: set[nn.Parameter]) -> set[nn.Parameter]:
    """Replace the parameters of a module (one FSDP unit) that are not sharded yet by copies on the device.

    Tied parameters are copied once.

    Args:
        seen: the parameters of earlier units. A trained one cannot be shared with them.

    Returns:
        the original parameters.

    Raises:
        UserError: the unit shares a trained parameter with an earlier unit.
    """
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

"""A module with other tensors than its own as its parameters and buffers."""

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations


def parameters_of(attention: nn.Module) -> dict[str, Tensor]:
    return dict(attention.named_parameters(remove_duplicate=False))


def buffers_of(attention: nn.Module) -> dict[str, Tensor]:
    return dict(attention.named_buffers(remove_duplicate=False))


def plain(module: nn.Module) -> nn.Module:
    """The same module with what its parametrizations make as its parameters, which are all there is to find gradients
    of then; itself, where it has none.
    """
    children = {name: None if x is None else plain(x) for name, x in module._modules.items()}
    made = {}
    if is_parametrized(module):
        made = {name: getattr(module, name) for name in children.pop("parametrizations")}
    elif all(x is y for x, y in zip(children.values(), module._modules.values(), strict=True)):
        return module
    other = object.__new__(type_before_parametrizations(module))
    other.__dict__.update(module.__dict__)
    other.__dict__["_parameters"], other.__dict__["_modules"] = module._parameters | made, children
    return other


def with_tensors(module: nn.Module, held: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """The same module with other parameters and buffers. Not by `copy`, which FSDP refuses, nor by `functional_call`,
    which lets other threads see them.
    """
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = getattr(module, kind)
        other.__dict__[kind] = {name: None if x is None else held[prefix + name] for name, x in own.items()}
    other.__dict__["_modules"] = {
        name: None if child is None else with_tensors(child, held, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return other

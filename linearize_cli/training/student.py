"""The parameters that distillation trains: LoRA and the linear parameters, or all but the vocabulary's."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from linearize_kernels.equation import LinearAttention
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from linearize_cli.methods.recipe import Lora
from linearize_cli.runtime.dispatch import converted


def lora_targets(model: PreTrainedModel, reach: str = "attention") -> list[str]:
    """Return the names of the Linear and Conv1D modules that get an update.

    Args:
        reach: `attention`: those in the converted modules; `all`: those in the layers around these too.
    """
    roots = dict.fromkeys(converted(model))
    if reach == "all":
        roots = dict.fromkeys(layer_of(model, name) for name in roots)
    return [
        f"{root}.{part}"
        for root in roots
        for part, child in model.get_submodule(root).named_modules()
        if isinstance(child, nn.Linear | Conv1D)
    ]


def layer_of(model: nn.Module, name: str) -> str:
    """Return the name of the layer that a module is in: an element of the outermost ModuleList, else the module."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return name


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Wrap a linearized model with LoRA. LoRA and the linear parameters become trainable, both in fp32."""
    targets = lora_targets(model, lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    student = get_peft_model(model, config)
    for module in student.modules():
        if isinstance(module, LinearAttention):
            module.requires_grad_(True)
    return student


def student_and_teacher(
    model: PreTrainedModel, lora: Lora | None
) -> tuple[PeftModel | PreTrainedModel, PreTrainedModel | None]:
    """Return the student of a linearized model and, where the weights of the model are trained, a frozen teacher."""
    if lora is None:
        return model, unfreeze(model)
    return add_lora(model, lora), None


class Cast(nn.Module):
    """Cast a parameter to the dtype that the model computes in."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def vocabulary_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the embeddings and of the head."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return [p for module in (*modules, head) if module is not None for p in module.parameters()]


def unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make all parameters but the embeddings and the head trainable. Tied ones stay tied.

    A parameter of fewer than 32 bits is kept in fp32, because small steps would be rounded away, and cast where it
    is used. `merge` undoes this.

    Returns:
        The teacher: a frozen copy of the model that shares its embeddings and has no linear parameters.
    """
    shared = {id(p): p for p in vocabulary_parameters(model)}
    model.requires_grad_(False)
    teacher = copy.deepcopy(model, dict(shared))
    for module in converted(teacher).values():
        del module.linear_attention
    trained = [
        (module, name, p)
        for module in list(model.modules())
        for name, p in module.named_parameters(recurse=False)
        if id(p) not in shared and p.is_floating_point()
    ]
    for module, name, parameter in trained:
        if parameter.itemsize < torch.float32.itemsize:
            setattr(module, name, nn.Parameter(parameter.float()))
            register_parametrization(module, name, Cast(parameter.dtype), unsafe=True)
        else:
            parameter.requires_grad_(True)
    return teacher


@torch.no_grad()
def merge(student: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Merge LoRA into the weights, or cast trained parameters to their own dtype, and return the model."""
    if isinstance(student, PeftModel):
        return student.merge_and_unload()
    for module in list(student.modules()):
        for name in list(module.parametrizations) if is_parametrized(module) else ():
            value = getattr(module, name)
            remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return student


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """Return the layers that support gradient checkpointing in transformers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Apply gradient checkpointing to the layers while the context is open (arXiv 1604.06174).

    Transformers supports it in training mode only, where dropout is active. Here the model stays in evaluation mode.
    """
    layers = checkpointable(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

"""The parameters that distillation trains: LoRA and the linear parts, or all except the embeddings."""

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
    """Return the names of all Linear and Conv1D modules to adapt, found by structure.

    Args:
        reach: "attention" for those inside the converted modules, "all" for those inside their decoder
            layers.
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
    """Return the element of the outermost module list that contains a module, or the module's own name."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return name


def add_lora(model: PreTrainedModel, lora: Lora, on_meta: bool = False) -> PeftModel:
    """Wrap the model with LoRA. LoRA and the linear parts are trainable, both in fp32.

    Args:
        on_meta: True to create LoRA's parameters on the meta device.
    """
    targets = lora_targets(model, lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    student = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    for module in student.modules():
        if isinstance(module, LinearAttention):
            module.requires_grad_(True)
    return student


def student_and_teacher(
    model: PreTrainedModel, lora: Lora | None, on_meta: bool = False
) -> tuple[PeftModel | PreTrainedModel, PreTrainedModel | None]:
    """Return the model to train, and a separate teacher if it needs one.

    Args:
        lora: LoRA's options. None trains every weight, which requires a separate teacher.
        on_meta: see `add_lora`.
    """
    if lora is None:
        return model, unfreeze(model)
    return add_lora(model, lora, on_meta), None


class Cast(nn.Module):
    """A parametrization: an fp32 parameter, cast to the dtype in which the model computes."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make all parameters except the input and output embeddings trainable. Tied embeddings stay tied.

    A parameter below fp32 is stored in fp32 and cast where it is used, because small updates would be rounded
    away. `merge` undoes this.

    Returns:
        the teacher: a frozen copy of the model that shares its embeddings and has no linear parts.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    shared = {id(p): p for module in (*embeddings, head) if module is not None for p in module.parameters()}
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
    """Return the model to save: LoRA merged, and every parameter in its own dtype."""
    if isinstance(student, PeftModel):
        return student.merge_and_unload()
    for module in list(student.modules()):
        for name in list(module.parametrizations) if is_parametrized(module) else ():
            value = getattr(module, name)
            remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return student


def checkpointable(model: nn.Module) -> list[nn.Module]:
    """Return the layers that support gradient checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Use gradient checkpointing (arXiv 1604.06174) while the context is open.

    transformers supports it in training mode only, in which dropout is active. Here the model stays in eval
    mode, so the result does not change.
    """
    layers = checkpointable(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

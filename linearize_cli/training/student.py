"""The parameters that distillation trains.

With LoRA they are the LoRA weights and the parameters that the conversion added. Without it they are all
parameters except the embeddings and the LM head.
"""

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
    """Return the names of the Linear and Conv1D modules that LoRA adapts.

    Args:
        reach: `attention` for the modules inside converted attention modules, or `all` for every module
            inside the decoder layers that contain these.
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
    """Return the name of the decoder layer that contains a module: an entry of the outermost ModuleList.

    Return the module's own name if it is in no ModuleList.
    """
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return name


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Wrap a linearized model with LoRA.

    Only the LoRA weights and the parameters that the conversion added are trainable, both in fp32.
    """
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
    """Return the student to train, and its teacher.

    Args:
        model: the linearized model.
        lora: the LoRA settings. None: all weights except embeddings and LM head are trained.

    Returns:
        with LoRA, the wrapped model and None, because the student without LoRA is the teacher. Without LoRA,
            the model and a frozen copy of it.
    """
    if lora is None:
        return model, unfreeze(model)
    return add_lora(model, lora), None


class Cast(nn.Module):
    """A parametrization that casts an fp32 parameter to the dtype that the model computes in."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def vocabulary_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the embeddings and of the LM head."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return [p for module in (*modules, head) if module is not None for p in module.parameters()]


def unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make all parameters trainable except the embeddings and the LM head. Tied parameters stay tied.

    A parameter of fewer than 32 bits is kept in fp32, because small steps would be rounded away. It is cast
    to its own dtype where it is used. `merge` undoes this.

    Returns:
        the teacher: a frozen copy of the model that shares its embeddings and LM head, without the linear
            attention.
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
    """Merge LoRA into the weights and return the model without its wrapper.

    If the model was trained without LoRA, cast the fp32 parameters back to their own dtype.
    """
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
    """Apply gradient checkpointing to the model's layers while the context is open (arXiv 1604.06174).

    Transformers supports it in training mode only, where dropout is active. Here the model stays in
    evaluation mode.
    """
    layers = checkpointable(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

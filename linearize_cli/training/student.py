"""What of a linearized model distillation trains: LoRA and the linear parts, or all but the embeddings."""

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
    """Every Linear and Conv1D by structure, whatever a family calls them: inside the converted modules
    ("attention"), or inside the decoder layers that hold these ("all").
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
    """The layer that a module is part of: the element of the outermost list of modules; without one, itself."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return name


def add_lora(model: PreTrainedModel, lora: Lora, on_meta: bool = False) -> PeftModel:
    """Wrap the model with LoRA; LoRA and the linear parts are trainable, both in fp32. `on_meta`: LoRA's parameters
    are of shapes alone.
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
    """What distillation trains, made of a linearized model: with LoRA, or every weight, and then the teacher of its
    own that this takes. `on_meta` as in `add_lora`.
    """
    if lora is None:
        return model, unfreeze(model)
    return add_lora(model, lora, on_meta), None


class Cast(nn.Module):
    """A parameter as the model computes with it."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make all but the embeddings, input and output, trainable: what conversion changes has no say in the
    vocabulary, and tied ones stay tied. A parameter of less than fp32 is kept in fp32 and cast where it is used, for
    small steps would be rounded away; `merge` ends that.

    Returns:
        The teacher: a frozen copy of the model, which shares its embeddings and has no linear parts.
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
    """The model as it is saved: without LoRA, every parameter in its own dtype."""
    if isinstance(student, PeftModel):
        return student.merge_and_unload()
    for module in list(student.modules()):
        for name in list(module.parametrizations) if is_parametrized(module) else ():
            value = getattr(module, name)
            remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return student


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can compute again in the backward."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """While open, the layers' activations are computed again in the backward instead of kept (arXiv 1604.06174).

    Transformers does so in training mode alone, with whatever dropout the layers have; here the model stays in
    evaluation mode and the result the same.
    """
    layers = recomputable(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

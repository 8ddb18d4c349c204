"""Distillation: the linearized model learns its softmax teacher's logits through LoRA and its linear parts."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearize_cli.recipe import Distill, Lora
from linearize_cli.runtime.dispatch import attention_implementation, converted
from linearize_cli.runtime.layer import LinearizedAttention


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Every Linear and Conv1D inside the converted modules, by structure: whatever a family calls them."""
    return [
        f"{name}.{part}"
        for name, module in converted(model).items()
        for part, child in module.named_modules()
        if isinstance(child, nn.Linear | Conv1D)
    ]


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Wrap the model with LoRA on its converted modules; LoRA and the linear parts are trainable."""
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora_targets(model))
    student = get_peft_model(model, config)
    for module in student.modules():
        if isinstance(module, LinearizedAttention):
            module.requires_grad_(True)
    return student


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher ‖ student), a mean over tokens: the teacher's log-probabilities and the student's logits
    `[B, L, vocab]`.
    """
    total = kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    return total / logits[..., 0].numel()


def distill_loss(student: PeftModel, native: str, ids: Tensor, weights: Distill) -> Tensor:
    """`kl · KL(teacher ‖ student) + ce · cross entropy`, both means over tokens, for ids `[B, L]`.

    The teacher is the same model with its softmax attention back and LoRA off: its weights are held once.
    """
    logits = student(input_ids=ids, use_cache=False).logits.float()
    loss = logits.new_zeros(())
    if weights.kl:
        with torch.no_grad(), attention_implementation(student, native), student.disable_adapter():
            teacher = student(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        loss = loss + weights.kl * divergence(teacher, logits)
    if weights.ce:
        loss = loss + weights.ce * cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss

"""Distillation: the linearized model learns its softmax teacher's logits through LoRA and its linear parts."""

import torch
from linearize_kernels.attention import LinearAttention
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from linearize_cli.recipe import Distill, Lora
from linearize_cli.runtime.dispatch import attention_implementation, converted
from linearize_cli.tasks import IGNORED, Batch


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
        if isinstance(module, LinearAttention):
            module.requires_grad_(True)
    return student


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher ‖ student), a mean over all logits: the teacher's log-probabilities and the student's logits
    `[..., vocab]`.
    """
    total = kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    return total / logits[..., 0].numel()


def distill_loss(student: PeftModel, native: str, batch: Batch, weights: Distill) -> Tensor:
    """`kl · KL(teacher ‖ student) + ce · cross entropy + hidden · error of the last hidden states`.

    The KL is the mean over the logits that count, the cross entropy that over the right answers, the error the
    squared one relative to the teacher's mean square. The teacher is the same model with its softmax attention
    back and LoRA off: its weights are held once.
    """
    inputs = batch.inputs | ({"output_hidden_states": True} if weights.hidden else {})
    output = student(**inputs)
    logits = output.logits.float()
    loss = logits.new_zeros(())
    if weights.kl or weights.hidden:
        with torch.no_grad(), attention_implementation(student, native), student.disable_adapter():
            teacher = student(**inputs)
            target = teacher.logits.float().log_softmax(-1)
    if weights.kl:
        counted = ... if batch.counted is None else batch.counted
        loss = loss + weights.kl * divergence(target[counted], logits[counted])
    if weights.ce:
        answers = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        loss = loss + weights.ce * answers
    if weights.hidden:
        loss = loss + weights.hidden * relative_error(last_hidden(output), last_hidden(teacher))
    return loss


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """The mean squared error, relative to the mean square of what is expected."""
    actual, expected = actual.float(), expected.float()
    return (actual - expected).square().mean() / expected.square().mean()


def last_hidden(output: ModelOutput) -> Tensor:
    """`[B, T, width]`, of the decoder where there is one."""
    states = output.get("hidden_states") or output.decoder_hidden_states
    return states[-1]

"""The decays of linear attention, set from the distances at which the softmax teacher attends."""

from collections.abc import Callable, Iterable

import torch
from linearize_kernels.parts.decay import Decay
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize_cli.models.batch import Batch
from linearize_cli.runtime.dispatch import converted
from linearize_cli.training.attention_transfer import attending, softmax_attention

RATES = torch.logspace(-5, 0, 101, dtype=torch.float64)  # decays per token, -log a, to choose from


def decaying(model: PreTrainedModel) -> dict[nn.Module, Decay]:
    """Return the decay of each attention module whose linear part forgets."""
    modules = converted(model).values()
    found = {module: getattr(module.linear_attention.far, "memory", None) for module in modules}
    return {module: memory for module, memory in found.items() if isinstance(memory, Decay)}


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    native: str,
    batches: Iterable[Batch],
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Set each head's decay to the rate under which the teacher's attention beyond the window is most likely.

    Attention that falls by a factor of `e^-rate` a token is a geometric distribution over distances. Attention sinks do
    not count. The idea to set gates from the teacher's attention is from Taylor-Calibrate (arXiv 2606.16429).

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).
        batches: some text. The model's other parameters do not change.
        advance: called with the number of tokens of each batch.
    """
    memories = decaying(model)
    likelihood = {module: torch.zeros((), dtype=torch.float64) for module in memories}

    def attend(module, query, key, value, attention_mask, **kwargs):
        output, weights = softmax_attention(module, "eager")(
            module, query, key, value, attention_mask, **kwargs
        )
        if module in memories:
            eq = module.linear_attention.equation
            likelihood[module] = likelihood[module] + log_likelihood(weights, eq.size, eq.sinks).cpu()
        return output, None

    with attending(model, attend, "eager"):
        for batch in batches:
            model(**batch.inputs)
            advance(batch.inputs["input_ids"].numel())
    for module, memory in memories.items():
        heads = len(memory.decay_bias)
        rates = RATES[likelihood[module].view(heads, -1, len(RATES)).sum(1).argmax(-1)]
        memory.set_rates(rates)


def log_likelihood(weights: Tensor, window: int, sinks: int) -> Tensor:
    """Return the log-likelihood of attention weights under each decay of RATES, `[heads, rates]` fp64.

    A query attends to a token at distance d beyond the window with a probability proportional to `e^{-rate d}`.

    Args:
        weights: softmax attention weights `[B, heads, T, T]`, causal.
        window: the number of nearest tokens that do not count, the query's own among them.
        sinks: the number of first tokens that do not count.
    """
    length = weights.shape[-1]
    position = torch.arange(length, device=weights.device)
    distance = (position[:, None] - position) - max(window, 1)
    counted = (distance >= 0) & (position >= sinks)
    mass = (weights * counted).sum(0)
    rates = RATES.to(mass.device)
    # A query's normaliser: the sum of e^{-rate d} over its counted tokens, which are consecutive.
    nearest, count = distance.masked_fill(~counted, length).amin(-1)[:, None], counted.sum(-1)[:, None]
    normaliser = torch.log(torch.expm1(-rates * count) / torch.expm1(-rates)) - rates * nearest
    normaliser = normaliser.masked_fill(count == 0, 0.0)
    travelled = (mass * distance).sum((-1, -2)).double()
    return -rates * travelled[:, None] - mass.sum(-1).double() @ normaliser

"""The check `definition`: layer outputs against `step`, the reference that computes one token at a time in
fp64.

The reference uses the layer's own scores and feature maps.
"""

import copy

import torch
from linearize_kernels.reference.step import step, step_state
from torch import Tensor, nn

from linearize_cli.metrics.equivalence import Comparison
from linearize_cli.runtime.dispatch import converted
from linearize_cli.verification.check import Finding, Subject, compared, not_checked


def definition(subject: Subject) -> Finding:
    """Compare the outputs of converted layers with the reference `step`, which computes one token at a time.

    One layer of each distinct equation is compared, on the q, k and v that it receives for a row of tokens.
    """
    layers = {x.equation: x for x in causal_layers(subject)}
    if not layers:
        return not_checked("definition", "no converted layer is causal self-attention")
    worst = Comparison(subject.comparison().tolerance, 0.0)
    for attention in layers.values():
        inputs, options, actual = layer_call(subject, attention)
        worst.add(actual, reference_outputs(attention, *inputs, options.get("s_aux")))
    data = {"definition": {"max_abs_diff": worst.diff, "layers": len(layers)}}
    return compared("definition", worst.diff, worst.limit, data)


def causal_layers(subject: Subject) -> list[nn.Module]:
    """Return the converted layers that are causal self-attention, without cross-attention to an encoder."""
    geometries = subject.model.config.linearize["layers"]
    layers = {name: module.linear_attention for name, module in converted(subject.model).items()}
    return [x for name, x in layers.items() if x.equation.causal and "cross" not in geometries[name]]


def layer_call(subject: Subject, attention: nn.Module) -> tuple[tuple[Tensor, ...], dict, Tensor]:
    """Run the model on the test rows, and record the call of one layer's attention for the first row.

    Returns:
        q, k and v `[heads, T, D]`, the keyword arguments, and the output `[T, heads, Dv]`.
    """
    seen: list[tuple] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.append((args[:3], kwargs, output))

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    try:
        subject.task.read(subject.model, list(subject.rows))
    finally:
        hook.remove()
    inputs, options, output = seen[0]
    return tuple(x[0] for x in inputs), options, output[0]


def layer_inputs(subject: Subject, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model on the test rows, and return one layer's q, k and v, with all rows joined into one:
    `[1, heads, T, D]`.
    """
    seen: list[tuple[Tensor, ...]] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[:3]))
    try:
        subject.task.read(subject.model, list(subject.rows))
    finally:
        hook.remove()
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in seen[0])
    return q, k, v


def reference_outputs(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None
) -> Tensor:
    """Compute a layer's outputs `[T, heads, Dv]` with the reference implementation (`reference.step`), one token
    at a time in fp64 on the CPU.

    Args:
        attention: the layer.
        q, k, v: `[heads, T, D]`. Keys and values have as many heads as the layer has KV heads.
        sink_logits: the model's learned sink logits, or None if it has none.
    """
    exact = copy.deepcopy(attention).to("cpu", torch.float64)
    q, k, v = (x.detach().to("cpu", torch.float64) for x in (q, k, v))
    if sink_logits is not None:
        sink_logits = sink_logits.detach().to("cpu", torch.float64)
    state, outputs = step_state(exact), []
    for t in range(q.shape[1]):
        out, state = step(exact, state, q[:, t], k[:, t], v[:, t], sink_logits)
        outputs.append(out)
    return torch.stack(outputs).to(q.device)

"""The forms of attention that `attention.py` compares, each over q, k, v `[B, heads, T, D]` of one layer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from floors import BOTH, DECODE, Sizes, Work, gated_delta_work, linear_work, simple_gla_work, softmax_work
from linearize_kernels import LinearAttention, chunked
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from linearize_cli.methods.registry import load_recipe
from linearize_cli.metrics.timing import Run
from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.layer import equation

METHODS = ("augmented", "augmented:flash")
STEPS = 64  # decoding steps in one run
SDPA = "sdpa"  # prefix of the names of softmax attention


class Form(NamedTuple):
    """One form of attention, such as softmax or a method of linearize.

    Attributes:
        attend: (q, k, v) -> out, causal.
        decoder: (q, k, v) -> a function that decodes one more token after these T. It uses q, k and v of the
            last token as those of the next one.
        work: (sizes, phase) -> the form's FLOPs and bytes.
        parameters: the tensors besides q, k and v that receive gradients.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    decoder: Callable[[Tensor, Tensor, Tensor], Run]
    work: Callable[[Sizes, str], Work]
    parameters: Sequence[Tensor] = ()

    def ready(self, phase: str, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Run:
        """Return a function that runs one phase (forward, forward and backward, or decode) once.

        A decode run is `STEPS` tokens in a row, so that the caches are in the state that they have in a real
        text.
        """
        if phase == DECODE:
            with torch.no_grad():
                step = self.decoder(q, k, v)

            @torch.no_grad()
            def steps() -> None:
                for _ in range(STEPS):
                    step()

            return steps
        if phase != BOTH:
            return torch.no_grad()(partial(self.attend, q, k, v))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def both() -> None:
            out = self.attend(*leaves)
            torch.autograd.grad(out, [*leaves, *self.parameters], d_out, allow_unused=True)

        return both


def forms(sizes: Sizes, device: torch.device, generator: torch.Generator) -> dict[str, Form]:
    """Return all forms that this device can run, by name."""
    found = {method: ours(method, sizes, device, generator) for method in METHODS}
    if device.type != "cuda":
        return found | {SDPA: softmax(None)}
    found |= {
        f"{SDPA}, flash": softmax(SDPBackend.FLASH_ATTENTION),
        f"{SDPA}, cuDNN": softmax(SDPBackend.CUDNN_ATTENTION),
    }
    return found | (fla_forms(sizes, device) if find_spec("fla") else {})


def ours(method: str, sizes: Sizes, device: torch.device, generator: torch.Generator) -> Form:
    """Return linearize's attention by one method. Its parameters are moved at random from their initial
    values.
    """
    geometry = dict(
        heads=sizes.heads,
        kv_heads=sizes.heads,
        key_dim=sizes.dim,
        value_dim=sizes.dim,
        scale=sizes.dim**-0.5,
    )
    attention = LinearAttention(equation(load_recipe(method).to_dict()["attention"], geometry))
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    attention.to(device)

    def decoder(q: Tensor, k: Tensor, v: Tensor) -> Run:
        layer = LinearCacheLayer()
        layer.attend(attention, q, k, v, None, None)
        return partial(layer.attend, attention, *(x[..., -1:, :] for x in (q, k, v)), None, None)

    return Form(
        lambda q, k, v: chunked(attention, None, q, k, v)[0],
        decoder,
        partial(linear_work, attention),
        list(attention.parameters()),
    )


def softmax(backend: SDPBackend | None) -> Form:
    """Return softmax attention by torch's scaled_dot_product_attention. With the backend None, torch chooses
    one.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    def decoder(q: Tensor, k: Tensor, v: Tensor) -> Run:
        return partial(attend, q[..., -1:, :], k.contiguous(), v.contiguous(), causal=False)

    return Form(attend, decoder, softmax_work)


def fla_forms(sizes: Sizes, device: torch.device) -> dict[str, Form]:
    """Return two layers of flash-linear-attention by name (simple GLA and gated delta rule), with random
    gates.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    shape = (sizes.batch, sizes.tokens, sizes.heads)
    g = logsigmoid(torch.randn(shape, device=device) + 3).requires_grad_()
    beta = torch.randn(shape, device=device).sigmoid().requires_grad_()
    return {
        "fla simple_gla": fla_form(chunk_simple_gla, fused_recurrent_simple_gla, simple_gla_work, g=g),
        "fla gated_delta_rule": fla_form(
            partial(chunk_gated_delta_rule, use_qk_l2norm_in_kernel=True),
            partial(fused_recurrent_gated_delta_rule, use_qk_l2norm_in_kernel=True),
            gated_delta_work,
            g=g,
            beta=beta,
        ),
    }


def fla_form(
    chunk: Callable, recurrent: Callable, work: Callable[[Sizes, str], Work], **gates: Tensor
) -> Form:
    """Return the form of a function of flash-linear-attention, whose tensors are `[B, T, heads, D]`.

    Args:
        chunk: its function for a whole row.
        recurrent: its function for one token.
        work: (sizes, phase) -> the form's FLOPs and bytes.
        gates: `[B, T, heads]` each.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunk(*(x.transpose(1, 2) for x in (q, k, v)), **gates)[0].transpose(1, 2)

    def decoder(q: Tensor, k: Tensor, v: Tensor) -> Run:
        past = [x.transpose(1, 2) for x in (q, k, v)]
        state = chunk(*past, **gates, output_final_state=True)[1]
        last = [x[:, -1:].contiguous() for x in past]
        own = {name: gate[:, -1:].contiguous() for name, gate in gates.items()}
        return partial(recurrent, *last, **own, initial_state=state, output_final_state=True)

    return Form(attend, decoder, work, list(gates.values()))

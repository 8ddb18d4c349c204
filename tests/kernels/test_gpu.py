"""Compiled kernels on a GPU, at real sizes: long texts, token trees, CUDA graphs, and a small conversion."""

import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from linearize_kernels import LinearAttention, chunked

from linearize_cli import convert, verify
from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime.layer import equation

pytestmark = pytest.mark.gpu
METHODS = ["augmented", "augmented:flash"]
WIDTH = 128  # of a head


def long_layer(method: str) -> LinearAttention:
    geometry = dict(heads=4, kv_heads=2, key_dim=WIDTH, value_dim=WIDTH, scale=WIDTH**-0.5)
    torch.manual_seed(0)
    attention = LinearAttention(equation(load_recipe(method).to_dict()["attention"], geometry)).cuda()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return attention


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", METHODS)
def test_the_error_does_not_grow_with_the_text(method):
    """Keys have a common mean, whose sum a state in bfloat16 would lose."""
    errors, attention = [], long_layer(method)
    for length in (2048, 65536):
        heads = [(torch.randn(1, n, length, WIDTH, device="cuda") + 0.3).bfloat16() for n in (4, 2, 2)]
        with torch.no_grad():
            attention.float().impl = "triton"
            found = chunked(attention, None, *heads)[0]
            attention.double().impl = "torch"
            errors.append(relative(found, chunked(attention, None, *(x.double() for x in heads))[0]))
    assert max(errors) <= 4e-3 and errors[1] <= 1.2 * errors[0], errors


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    found, attention = [], long_layer(method)
    heads = [torch.randn(2, n, 1000, WIDTH, device="cuda") + 0.3 for n in (4, 2, 2)]
    for impl, dtype, wide in (
        ("triton", torch.bfloat16, torch.float32),
        ("torch", torch.float64, torch.float64),
    ):
        attention.to(wide).impl = impl
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in heads]
        out = chunked(attention, None, *leaves)[0]
        assert attention.ran == impl
        found.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *attention.parameters()])])
    assert max(relative(x, y.double()) for x, y in zip(*found, strict=True)) <= 1e-2


def test_a_captured_step_writes_what_plain_steps_write():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from cuda_graph import Captured
    from families import swap

    model = tiny_model("llama").cuda().eval()
    swap(model)
    ids = torch.randint(3, 90, (2, 40), device="cuda")
    with torch.no_grad():
        expected = model(ids).logits[:, 30:]
        cache = model(ids[:, :30], use_cache=True).past_key_values
        step = Captured(model, cache, torch.full((2,), 30, device="cuda"))
        found = torch.cat([step(ids[:, t : t + 1]).clone() for t in range(30, 40)], 1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_small_conversion(tmp_path):
    report = convert("demo", tmp_path / "demo", tokens="64k", device="cuda")
    assert report["perplexity"]["recovered"] < 1.1 * report["perplexity"]["transferred"]
    assert verify(tmp_path / "demo", device="cuda", quick=True)["verdict"] != "FAIL"

"""Memory that is taken again: no result lies in it, and threads have their own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linearize_kernels import LinearAttention, chunked
from linearize_kernels.features import SoftmaxPair, softmax_pair
from linearize_kernels.scratch import KEPT, Scratch

from linearize_cli.methods import load_recipe
from linearize_cli.runtime.layer import equation

LENGTH, PIECE = 150, 41


@pytest.fixture(params=["augmented", "augmented:relu", "augmented:flash"])
def attention(request, monkeypatch):
    monkeypatch.setattr("linearize_kernels.blocked.CACHED", 1)  # one head after the other
    recipe = load_recipe(request.param).to_dict()["attention"]
    recipe["local"]["size"] = 16
    geometry = dict(heads=4, kv_heads=2, key_dim=64, value_dim=64, scale=0.125, softcap=None)
    torch.manual_seed(0)
    attention = LinearAttention(equation(recipe, geometry)).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, LENGTH, 64, dtype=torch.float64, generator=generator) for h in (4, 2, 2)]


def results(attention, inputs):
    """Outputs and states of two calls, the second after the first."""
    first, second = zip(*(x.split([PIECE, LENGTH - PIECE], -2) for x in inputs), strict=True)
    out, state = chunked(attention, None, *first)
    assert attention.ran == "torch"
    later, end = chunked(attention, state, *second)
    return [out, *vars(state).values(), later, *vars(end).values()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_result_lies_in_it(attention, mode):
    expected = [results(attention, tokens(seed)) for seed in range(2)]
    with mode():
        found = [results(attention, tokens(seed)) for seed in range(2)]
    again = results(attention, tokens(0))  # memory first taken in inference mode
    for pair in zip([*expected[0], *expected[1], *expected[0]], [*found[0], *found[1], *again], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


def test_threads_have_their_own(attention):
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [results(attention, tokens(seed)) for seed in range(4)]

        def run(seed):
            with torch.no_grad():
                return results(attention, tokens(seed))

        for seed, found in zip(range(40), pool.map(run, (seed % 4 for seed in range(40))), strict=True):
            for pair in zip(expected[seed % 4], found, strict=True):
                torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_it_keeps_no_more_than_it_says():
    scratch, like = Scratch(), torch.zeros(1)
    first = scratch.take("name", like, 3, 5)
    assert scratch.take("name", like, 2, 4).data_ptr() == first.data_ptr()
    assert scratch.take("other", like, 3, 5).data_ptr() != first.data_ptr()
    assert scratch.take("name", like.double(), 3, 5).dtype == torch.float64
    assert scratch.take("large", like, KEPT + 1).shape == (KEPT + 1,)
    assert scratch.blocks.keys() == {
        ("name", torch.float32),
        ("other", torch.float32),
        ("name", torch.float64),
    }


@pytest.mark.parametrize("weighted", [False, True])
def test_features_have_the_gradients_of_their_definition(weighted):
    torch.manual_seed(0)
    x, W = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 5, 4), (2, 4, 6))
    )
    weight = torch.rand(3, 2, 5, 1, dtype=torch.float64).requires_grad_() if weighted else None
    y = x @ W
    expected = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1) * (weight if weighted else 1)
    torch.testing.assert_close(
        softmax_pair(x.detach(), W.detach(), weight.detach() if weighted else None), expected
    )
    inputs = [x, W, weight] if weighted else [x, W]
    assert torch.autograd.gradcheck(
        lambda *given: SoftmaxPair.apply(*given, *[None] * (3 - len(given))), inputs
    )


def test_features_that_do_not_count_have_no_gradient():
    torch.manual_seed(0)
    x, W = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    weight = torch.tensor([1.0, 0, 1, 0, 1])[:, None].expand(2, 5, 1)
    d_x, d_W = torch.autograd.grad(SoftmaxPair.apply(x, W, weight), [x, W], torch.randn(2, 5, 12))
    assert d_x.isfinite().all() and d_W.isfinite().all()
    assert not d_x[:, [1, 3]].any() and d_x[:, [0, 2, 4]].any()

"""Memory that is taken again: no result lies in it, and threads have their own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linearize_kernels import LinearAttention, chunked
from linearize_kernels.parts.feature_maps import FEATURE_MAPS, FeatureMap, Hedgehog, feature_map
from linearize_kernels.torch_forms.scratch import KEPT, SCRATCH, Scratch
from linearize_kernels.torch_forms.sliding_lane import masks_of
from linearize_kernels.torch_forms.softmax_pair import SoftmaxPair, softmax_pair
from torch._subclasses.fake_tensor import FakeTensorMode

from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime.layer import equation

LENGTH, PIECE = 150, 41


@pytest.fixture(params=["augmented", "augmented:relu", "augmented:flash"])
def attention(request, monkeypatch):
    monkeypatch.setattr("linearize_kernels.torch_forms.tiles.CACHED", 1)  # one head after the other
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


def test_it_is_where_its_like_is():
    SCRATCH.blocks.clear()
    SCRATCH.made.clear()
    with torch.device("meta"):
        assert SCRATCH.take("name", torch.zeros(1, device="cpu"), 3).device.type == "cpu"


def test_nothing_is_kept_of_tensors_without_values(attention):
    expected = results(attention, tokens(0))
    masks_of.cache_clear()
    SCRATCH.blocks.clear()
    SCRATCH.made.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        chunked(attention, None, *(mode.from_tensor(x) for x in tokens(0)))
    for pair in zip(results(attention, tokens(0)), expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_autocast_changes_little(attention):
    attention, inputs = attention.float(), [x.float().requires_grad_() for x in tokens(0)]
    found = []
    for narrowed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrowed):
            out, _ = chunked(attention, None, *inputs)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.fixture()
def of_its_own():
    """A feature map that is not a number at zero, of the signatures that a user writes."""

    @feature_map("unsafe")
    class Unsafe(FeatureMap):
        positive, per_head = True, ()

        def forward(self, x):
            return (x / x.norm(dim=-1, keepdim=True)).relu()

        def of_heads(self, x, heads):
            return self(x)

    yield "unsafe"
    del FEATURE_MAPS["unsafe"]


def test_no_features_are_asked_of_tokens_that_are_not_there(of_its_own):
    recipe = load_recipe("augmented").to_dict()["attention"]
    recipe["local"]["size"], recipe["far"]["feature_map"] = 16, of_its_own
    geometry = dict(heads=4, kv_heads=2, key_dim=64, value_dim=64, scale=0.125, softcap=None)
    attention = LinearAttention(equation(recipe, geometry)).double()
    inputs = [x.requires_grad_() for x in tokens(0)]
    for found in results(attention, inputs):
        assert found.isfinite().all()
    gradients = torch.autograd.grad(chunked(attention, None, *inputs)[0].sum(), inputs)
    assert all(x.isfinite().all() for x in gradients)


def test_a_hedgehog_of_its_own_is_asked():
    class Twice(Hedgehog):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    own, x = Twice(2, 4), torch.randn(2, 5, 4)
    own.reset_parameters()
    with torch.no_grad():
        torch.testing.assert_close(own.of_heads(x[1:], slice(1, 2)), own(x)[1:])
        expected = own(x) * torch.tensor([0.0, 1, 1, 1, 0])[:, None]
        torch.testing.assert_close(own.between(x, slice(None), 1, 1, None), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("before, ahead", [(0, 0), (2, 1)])
def test_features_and_gradients_are_those_of_their_definition(weighted, before, ahead):
    torch.manual_seed(0)
    x, W = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 5, 4), (2, 4, 6))
    )
    weight = torch.rand(3, 2, 5, 1, dtype=torch.float64).requires_grad_() if weighted else None
    inputs = [x, W, weight] if weighted else [x, W]
    y = x @ W
    expected = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1) * (weight if weighted else 1)
    expected[..., :before, :] = expected[..., 5 - ahead :, :] = 0
    with torch.no_grad():
        torch.testing.assert_close(softmax_pair(x, W, weight, before, ahead), expected)

    def features(*given):
        return SoftmaxPair.apply(*given, *[None] * (3 - len(given)), before, ahead)

    assert torch.autograd.gradcheck(features, inputs)

"""Every base recipe against its paper's formula: chunks, single tokens and gradients."""

from importlib.resources import files

import pytest
import torch
from linearize_kernels import chunked
from papers import HEADS, PAPERS, VALUE_DIM, expected, layer, randomise, tokens

# Sizes that leave several windows, groups and periods within 130 tokens.
SMALL = {
    "flash": ["attention.local.size=20"],
    "flash-local": ["attention.local.size=20"],
    "linformer": ["attention.far.feature_dim=7"],
    "lolcats": ["attention.local.size=20"],
    "lolcats-group": ["attention.local.size=20"],
    "window": ["attention.local.size=20"],
    "yoso-e": ["attention.local.size=20"],
}
CASES = [(name, []) for name in PAPERS] + list(SMALL.items())
LENGTHS = [1, 5, 63, 64, 65, 130]


def test_every_base_recipe_has_its_paper_here():
    recipes = {
        file.name.removesuffix(".yaml") for file in files("recipes").iterdir() if file.name.endswith(".yaml")
    }
    assert set(PAPERS) == recipes - {"augmented"}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name, overrides", CASES)
def test_chunks_equal_the_paper_s_formula(name, overrides, kv_heads, length):
    torch.manual_seed(length)
    attention = randomise(layer(name, *overrides, kv_heads=kv_heads))
    q, k, v = tokens(length, kv_heads)
    formula = expected(name, attention, q, k, v)
    for chunk in (1, 16, 64, 100):
        torch.testing.assert_close(chunked(attention, None, q, k, v, chunk=chunk)[0], formula)


@pytest.mark.parametrize("name, overrides", CASES)
def test_decoding_token_by_token_equals_the_paper_s_formula(name, overrides):
    torch.manual_seed(0)
    attention = randomise(layer(name, *overrides, kv_heads=2))
    q, k, v = tokens(130, 2)
    state, outputs = None, []
    for t in range(130):
        out, state = chunked(attention, state, *(x[:, :, t : t + 1] for x in (q, k, v)))
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), expected(name, attention, q, k, v))


@pytest.mark.parametrize("name, overrides", [case for case in CASES if not case[0].startswith("yoso")])
def test_gradients_equal_the_formula_s(name, overrides):
    torch.manual_seed(1)
    attention = randomise(layer(name, *overrides, kv_heads=2))
    inputs = [x.requires_grad_() for x in tokens(65, 2)]
    leaves = [*inputs, *attention.parameters()]
    towards = torch.randn(1, HEADS, 65, VALUE_DIM, dtype=torch.float64)
    ours = torch.autograd.grad(chunked(attention, None, *inputs, chunk=16)[0], leaves, towards)
    formula = torch.autograd.grad(expected(name, attention, *inputs), leaves, towards)
    torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-7)

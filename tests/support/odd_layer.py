"""A layer whose sizes do not divide one another, and random tokens for it, in fp64."""

import torch
from linearize_kernels import LinearAttention

from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime.layer import equation


def layer(name, heads=4, kv_heads=2, size=6, width=5, impl="auto", causal=True, **changes):
    """A layer with random parameters and parts that do not divide one another; changes go to its recipe."""
    recipe = load_recipe(name).to_dict()["attention"] | changes
    if recipe["local"]:
        recipe["local"]["size"] = size
    if recipe.get("conv"):
        recipe["conv"]["width"] = width
    geometry = dict(heads=heads, kv_heads=kv_heads, key_dim=8, value_dim=7, scale=0.3, softcap=None)
    geometry |= {} if causal else dict(causal=False)
    torch.manual_seed(0)
    attention = LinearAttention(equation(recipe, geometry)).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    attention.impl = impl
    return attention


def tokens(length, heads=4, kv_heads=2, batch=3):
    """q, k, v with means: a sum over random keys alone would hide what is forgotten."""
    widths = ((heads, 8), (kv_heads, 8), (kv_heads, 7))
    return [(torch.randn(batch, h, length, d, dtype=torch.float64) + 0.4).requires_grad_() for h, d in widths]

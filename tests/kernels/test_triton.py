"""Triton's forms against the references in fp64: outputs, states and the chunked forms' gradients."""

import sys

import pytest
import torch
import triton_case
from interpreted import printed
from linearize_kernels.ops.backend import prefill, why_not_prefill
from linearize_kernels.torch_forms.grouped import Groups
from linearize_kernels.torch_forms.sliding import Tokens
from linearize_kernels.triton.nodes import commit_, decode_one_token, tree
from linearize_kernels.triton.nodes import why_not as why_not_nodes
from transformers.dynamic_module_utils import get_imports
from triton_case import CASES, CAUSAL, GROUP_CASES, LAYERS, PACKED, layer
from triton_fused_case import FUSED
from triton_node_case import NODE_CASES, NODE_GROUP, NODE_SLIDING, draw_tokens, node_layer

from linearize_cli.runtime.bundle import copy_code

pytest.importorskip("triton")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def errors(request):
    """Run all cases in one process, in Triton's interpreter or compiled, and return their errors."""
    return printed(triton_case, request.param)


@pytest.mark.parametrize(
    "form, name", [*(("sliding", name) for name in CASES), *(("group", name) for name in GROUP_CASES)]
)
def test_outputs_and_gradients(form, name, errors):
    case, found = (CASES if form == "sliding" else GROUP_CASES)[name], errors[form][name]
    names = {"out", "S after", *Groups._fields}
    if form == "sliding":
        names = {"out", "S after", "z after", *Tokens._fields}
    if not case.get("far", True):
        names -= {"phi_q", "phi_k", "mix", "factor"}
    if case.get("width") == 0:
        names -= {"conv"}
    assert found.keys() == names
    bound = BOUNDS[case.get("dtype", torch.float32)]
    assert all(error <= bound for error in found.values()), found


@pytest.mark.parametrize("form", LAYERS)
def test_a_layer_that_triton_computes(form, errors):
    assert max(errors["layers"][form]) < 1e-4, errors["layers"][form]


@pytest.mark.parametrize("name", FUSED)
def test_fused_prefill(name, errors):
    found = errors["fused"][name]
    bound = BOUNDS[FUSED[name].get("dtype", torch.float32)]
    assert max(found.values()) <= (2e-6 if bound == 1e-5 else bound), found


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name, errors):
    assert max(errors["packed"][name]) <= BOUNDS[PACKED[name].get("dtype", torch.float32)], errors["packed"][
        name
    ]


@pytest.mark.parametrize("form", CAUSAL)
def test_packed_sequences_are_apart_to_the_bit(form, errors):
    found = errors["leaks"][form]
    assert found["outputs"] == found["gradients"] == 0
    assert min(found["own"], found["joined"]) > 1e-3  # so that equality above is no accident


@pytest.mark.parametrize(
    "form, case, reason",
    [
        ("sliding", dict(), "CUDA"),
        ("sliding", dict(dtype=torch.float64), "float64"),
        ("sliding", dict(values=torch.bfloat16), "q is torch.float32, and k and v must be too"),
        ("sliding", dict(chunk=48), "chunks must have .* not 48"),
        ("sliding", dict(width=300), "q and k have 300"),
        ("sliding", dict(feature_dim=256), "the features have 512"),
        ("sliding", dict(sinks=65, size=80), "65 sinks are more than 64"),
        ("encoder", dict(), "CUDA"),
        ("group", dict(), "CUDA"),
        ("group", dict(size=48), "groups must have .* not 48"),
    ],
)
def test_a_refusal_says_why(form, case, reason, monkeypatch):
    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", bool(case))
    attention, heads, chunk = refused(form, **case)
    attention.impl = "triton"
    with pytest.raises(ValueError, match=reason):
        prefill(attention, heads, 0, chunk=chunk)


def refused(form, dtype=torch.float32, values=None, chunk=32, width=16, **parts):
    """Make a layer, q, k and v, and a number of tokens in a chunk."""
    q, k, v = (torch.randn(1, heads, 80, width, dtype=dtype) for heads in (2, 1, 1))
    return layer(**LAYERS[form] | parts), (q, k, v.to(values or dtype)), chunk


@pytest.mark.parametrize("name", NODE_CASES)
def test_nodes(name, errors):
    """A tree is computed in fp32 throughout. In the interpreter, stores to bfloat16 truncate."""
    found, narrow = errors["nodes"][name], "dtype" in NODE_CASES[name]
    assert found["decoded"] <= (4e-3 if narrow else 2e-6), found
    assert max(found["tree"], found["state"]) <= 2e-6, found


@pytest.mark.parametrize(
    "parts, nodes, reason",
    [
        (NODE_SLIDING, 3, "CUDA"),
        (NODE_SLIDING | dict(combine="lolcats"), 3, "one normaliser"),
        (NODE_GROUP | dict(sinks=1), 3, "without a normaliser and sinks"),
        (NODE_SLIDING | dict(memory="decay"), 3, "forgets nothing"),
        (NODE_SLIDING | dict(bias=True), 3, "bias by distance"),
        (NODE_SLIDING | dict(softcap=30.0), 3, "softcap"),
        (NODE_SLIDING | dict(feature_map="linformer", key_weight=False), 3, "Linformer"),
        (NODE_SLIDING, 7, "7 nodes are more than 64 or the 6 tokens"),
        (NODE_SLIDING | dict(size=90), 65, "65 nodes"),
        (NODE_SLIDING | dict(sinks=65), 3, "65 sinks"),
        (NODE_SLIDING | dict(feature_dim=150), 3, "300 dimensions"),
    ],
)
def test_the_nodes_refusals(parts, nodes, reason, monkeypatch):
    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", reason != "CUDA")
    attention = node_layer(parts).float()
    state = attention.empty_state(2, "cpu", torch.float32)
    q, k, v = (x.float() for x in draw_tokens(attention, 2, nodes, torch.float32))
    assert reason in why_not_nodes(attention, state, q)
    visible, position = torch.ones(nodes, nodes, dtype=torch.bool).tril(), torch.arange(nodes).expand(2, -1)
    for call in (
        lambda: tree(attention, state, q, k, v, position, visible),
        lambda: commit_(attention, state, k, v),
    ):
        with pytest.raises(ValueError, match=reason):
            call()


def test_a_state_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", True)
    attention = node_layer(NODE_SLIDING).float()
    state = attention.empty_state(1, "cpu", torch.float32)
    token = [x.float() for x in draw_tokens(attention, 1, 1, torch.float32)]
    assert why_not_nodes(attention, state, token[0]) is None
    with pytest.raises(ValueError, match="not contiguous"):
        decode_one_token(attention, state.map(lambda x: x.expand(2, *x.shape[1:])), *token)


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "linearize_kernels.triton.common", raising=False)
    attention, heads, chunk = refused("sliding")
    assert why_not_prefill(attention, *heads, chunk) == "triton is not installed"


def test_a_loader_of_artifacts_demands_torch_and_transformers_alone(tmp_path):
    copy_code(tmp_path, None)
    paths = list(tmp_path.glob("*.py"))
    assert len(paths) > 30
    demanded = {package for path in paths for package in get_imports(path)} - sys.stdlib_module_names
    assert demanded <= {"torch", "transformers"}, demanded

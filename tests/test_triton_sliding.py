"""Triton's sliding form against the reference in fp64: outputs, states and every gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_case
from linearize_kernels import sliding as sliding_module
from linearize_kernels.sliding import Tokens
from linearize_kernels.triton_sliding import sliding, why_not
from transformers.dynamic_module_utils import get_imports
from triton_case import CASES, inputs

pytest.importorskip("triton")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def errors():
    """Of all cases, from one process whose Triton interprets."""
    path = os.pathsep.join([str(Path(triton_case.__file__).parents[1] / "kernels"), *sys.path])
    made = subprocess.run(
        [sys.executable, triton_case.__file__],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(made.stdout)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, errors):
    bound = BOUNDS[CASES[name].get("dtype", torch.float32)]
    names = {"out", "S after", "z after", *Tokens._fields}
    if not CASES[name].get("far", True):
        names -= {"phi_q", "phi_k", "mix"}
    if CASES[name].get("width") == 0:
        names -= {"conv"}
    assert errors[name].keys() == names
    assert all(error <= bound for error in errors[name].values()), errors[name]


def test_a_layer_that_triton_computes(errors):
    assert max(errors["layer"]) < 1e-4, errors["layer"]


@pytest.mark.parametrize(
    "case, reason",
    [
        (dict(), "CUDA"),
        (dict(dtype=torch.float64), "float64"),
        (dict(chunk=48), "not 48"),
        (dict(keys=300), "q and k have 300"),
        (dict(features=512), "the features have 512"),
    ],
)
def test_a_refusal_says_why(case, reason, monkeypatch):
    monkeypatch.setattr("linearize_kernels.triton_sliding_forward.INTERPRETED", bool(case))
    shape, tokens = inputs(**case)
    assert reason in why_not(shape, tokens)
    with pytest.raises(ValueError, match=reason):
        sliding(shape, tokens)


def test_mixed_dtypes_are_refused(monkeypatch):
    monkeypatch.setattr("linearize_kernels.triton_sliding_forward.INTERPRETED", True)
    shape, tokens = inputs()
    assert "bfloat16" in why_not(shape, tokens._replace(q=tokens.q.bfloat16()))
    assert why_not(shape, tokens) is None


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "linearize_kernels.triton_sliding_forward", raising=False)
    assert why_not(*inputs()) == "triton is not installed"


def test_a_loader_of_artifacts_does_not_demand_triton():
    paths = list(Path(sliding_module.__file__).parent.glob("triton_*.py"))
    assert len(paths) >= 3
    assert all("triton" not in get_imports(path) for path in paths)

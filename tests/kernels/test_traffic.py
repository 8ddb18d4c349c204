"""The bytes and launches of a layer's prefill on a GPU, counted on meta tensors."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
LENGTH = 1 << 15


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.parametrize(
    "method, launches, torch_bytes, kernel_bytes",
    [("augmented", 6, 1500, 3600), ("augmented:flash", 5, 1000, 2400)],
)
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_prefill_moves_little_but_its_inputs(method, launches, torch_bytes, kernel_bytes, kv_heads):
    from traffic import count

    found = count(method, LENGTH, kv_heads=kv_heads)
    assert found.launches <= launches and found.torch_bytes <= torch_bytes, found
    assert sum(moved for _, moved in found.kernels) <= kernel_bytes, found


def test_a_copy_of_the_inputs_would_be_counted(monkeypatch):
    """A planted fault: a layer that makes q, k and v contiguous moves them twice more."""
    import traffic
    from linearize_kernels.ops import fused

    before, inputs = traffic.count("augmented", LENGTH), fused.kernel_inputs
    monkeypatch.setattr(
        fused,
        "kernel_inputs",
        lambda state, count, heads: inputs(state, count, [x.contiguous() for x in heads]),
    )
    after = traffic.count("augmented", LENGTH)
    assert after.launches == before.launches + 3
    assert after.torch_bytes == pytest.approx(before.torch_bytes + 3 * 2 * 256, rel=0.01)

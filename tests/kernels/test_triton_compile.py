"""Every Triton kernel, as it is launched, compiles for several GPUs within their shared memory and registers.

No GPU is needed.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from triton_case import group_inputs, inputs
from triton_node_case import NODE_GROUP, NODE_SLIDING, draw_tokens, node_layer

triton = pytest.importorskip("triton")

from linearize_kernels import Equation, LinearAttention  # noqa: E402
from linearize_kernels.ops.backend import FORMS, Prefill  # noqa: E402
from linearize_kernels.ops.varlen import laid_out  # noqa: E402
from linearize_kernels.triton import (  # noqa: E402
    common,
    fused,
    fused_grouped,
    fused_sliding,
    grouped,
    node_kernels,
    node_state,
)
from linearize_kernels.triton import sliding_bwd as backward  # noqa: E402
from linearize_kernels.triton import sliding_fwd as forward  # noqa: E402
from linearize_kernels.triton.nodes import commit_, decode_one_token, tree  # noqa: E402

SLIDING = {
    "fold": common,
    "attend": forward,
    "query_means": backward,
    "query_gradients": backward,
    "query_feature_gradients": backward,
    "slot_gradients": backward,
    "slot_feature_gradients": backward,
}
GROUP = {
    "fold": common,
    "group_attend": grouped,
    "group_query_gradients": grouped,
    "answers": grouped,
    "group_slot_gradients": grouped,
}
CARRY = {"carry": common}  # launched for packed sequences only
FUSED = {
    "sliding": {
        "write_features": fused,
        "segment_sums": fused,
        "carry": fused,
        "attend_segment": fused_sliding,
    },
    "group": {"segment_sums": fused, "carry": fused, "attend_groups": fused_grouped},
}
NODES = {"take_in": node_state, "attend_nodes": node_kernels, "fold_path": node_state}
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # bytes of shared memory of a program
SPILLED = 0  # bytes of stack that a thread may spill to
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Recorder:
    """A stand-in for a kernel, which records its arguments once for every combination of types."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, {}

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
        kinds = tuple(type(x) if x is None or isinstance(x, torch.Tensor) else x for x in values.values())
        self.launches[kinds] = values


def recorded(chip, kernels, monkeypatch):
    """Replace the kernels by recorders, as they are launched on a chip, and return these by name."""
    recorders = {name: Recorder(getattr(module, name)) for name, module in kernels.items()}
    for name, module in kernels.items():
        monkeypatch.setattr(module, name, recorders[name])
    for module in ("tuning", "fused"):
        monkeypatch.setattr(
            f"linearize_kernels.triton.{module}.capability", lambda device: 8 if chip < 90 else chip // 10
        )
    return recorders


def launched(recorders):
    """List the recorded launches as `(kernel, values)`."""
    return [(x.kernel, values) for x in recorders.values() for values in x.launches.values()]


def launches(chip, kernels, monkeypatch, packed=False, **case):
    """Record the launches of a form's forward and backward on a chip as `(kernel, values)`."""
    recorders = recorded(chip, kernels | (CARRY if packed else {}), monkeypatch)
    usual = dict(dtype=torch.bfloat16, heads=1, chunk=64, chunks=2, width=32)
    if kernels is GROUP:
        shape, folds, tokens = group_inputs(**usual | (dict(recent=0) if packed else {}) | case)
        apart = layout(shape, 0) if packed else None
        tokens = tokens._replace(S=None) if packed else tokens
        out, S = grouped.forward(shape, folds, tokens, apart)
        grouped.backward(shape, folds, tokens, out, S, apart)
    else:
        shape, tokens = inputs(**usual | dict(recent=64, size=64, sinks=4) | case)
        apart = layout(shape, tokens.sink_k.shape[1]) if packed else None
        tokens = tokens._replace(S=None, z=None, sink_k=None, sink_v=None) if packed else tokens
        out, S, z, log_total = forward.forward(shape, tokens, apart)
        backward.backward(shape, tokens, log_total, out, S, z, apart)
    return launched(recorders)


def layout(shape, sinks):
    """Lay out two packed sequences of one chunk each."""
    bounds = (0, shape.chunk, 2 * shape.chunk - 1)
    return laid_out(bounds, shape.chunk, shape.recent, sinks, torch.device("cpu")).packed


def node_launches(chip, monkeypatch, parts, width, dtype):
    """Record the launches of a decoding step, a tree of 64 nodes and paths of different lengths."""
    monkeypatch.setattr("linearize_kernels.triton.common.INTERPRETED", True)  # no CUDA device is asked for
    recorders = recorded(chip, NODES, monkeypatch)
    attention = node_layer(parts, heads=4, key_dim=width, value_dim=width).to(dtype)
    state = attention.empty_state(1, "cpu", dtype)
    chain = torch.ones(64, 64, dtype=torch.bool).tril()
    token, nodes, path = ([x.to(dtype) for x in draw_tokens(attention, 1, n, dtype)] for n in (1, 64, 7))
    decode_one_token(attention, state, *token)
    tree(attention, state, *nodes, torch.arange(64)[None], chain)
    commit_(attention, state, *path[1:], chain[:1, :7])
    return launched(recorders)


def compiled(kernel, values, chip):
    """Compile a kernel for a chip."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: values[name] for name in ("num_warps", "num_stages")}
    signature, constants, divisible = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, torch.Tensor) or (aligned and not parameter.is_constexpr):  # as a launch does
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def resources(binary, path):
    """Return the registers and the bytes of stack of a thread."""
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups()))


def sized(kernels, width, features, chips, marks=(), **case):
    """Make the parameters of a test for some chips, with ids."""
    name = " ".join(["group" if kernels is GROUP else "sliding", *(f"{x} {case[x]}" for x in case)])
    case |= dict(keys=width, values=width, features=features)
    return [pytest.param(kernels, chip, case, marks=marks, id=f"{name}-{chip}-{width}") for chip in chips]


@pytest.mark.parametrize(
    "kernels, chip, case",
    [
        *sized(SLIDING, 64, 128, (90,)),
        *sized(SLIDING, 128, 256, SHARED),
        *sized(SLIDING, 64, 128, (80, 89, 100), pytest.mark.slow),
        *sized(SLIDING, 256, 256, SHARED, pytest.mark.slow),
        *sized(SLIDING, 128, 256, (80, 90), ahead=64),
        *sized(SLIDING, 128, 256, (89, 100), pytest.mark.slow, ahead=64),
        *sized(SLIDING, 64, 128, SHARED, pytest.mark.slow, ahead=64),
        *sized(SLIDING, 256, 256, SHARED, pytest.mark.slow, ahead=64),
        *sized(SLIDING, 128, 256, (90,), group=4),
        *sized(SLIDING, 128, 256, (80, 89, 100), pytest.mark.slow, group=4),
        *sized(SLIDING, 128, 256, SHARED, pytest.mark.slow, group=4, ahead=64),
        *sized(SLIDING, 128, 256, SHARED, pytest.mark.slow, group=4, packed=True),
        *sized(GROUP, 128, 256, (80, 90)),
        *sized(GROUP, 128, 256, (89, 100), pytest.mark.slow),
        *sized(GROUP, 64, 128, SHARED, pytest.mark.slow),
        *sized(GROUP, 256, 256, SHARED, pytest.mark.slow),
        *(
            sample
            for kernels in (SLIDING, GROUP)
            for width, features, chips, marks in (
                (128, 256, (90,), ()),
                (128, 256, (80, 89, 100), pytest.mark.slow),
                (64, 128, SHARED, pytest.mark.slow),
                (256, 256, SHARED, pytest.mark.slow),
            )
            for sample in sized(kernels, width, features, chips, marks, packed=True)
        ),
    ],
)
def test_kernels_fit(kernels, chip, case, monkeypatch, tmp_path):
    some = launches(chip, kernels, monkeypatch, **case)
    expected = kernels | (CARRY if "packed" in case else {})
    assert {kernel.__name__ for kernel, _ in some} == expected.keys()
    check_fit(some, chip, tmp_path)


def check_fit(some, chip, tmp_path):
    """Check that the kernels fit the chip's shared memory and spill no register."""
    for kernel, values in some:
        binary = compiled(kernel, values, chip)
        registers, stack = resources(binary, tmp_path / "kernel.cubin")
        print(f"{kernel.__name__} sm_{chip}: {registers} {stack} {binary.metadata.shared}")
        assert binary.metadata.shared <= SHARED[chip], kernel.__name__
        assert stack <= SPILLED, kernel.__name__


FUSED_FORMS = {
    "sliding": dict(size=64, feature_map="hedgehog", feature_dim=64, key_weight=True, conv_width=32, sinks=4),
    "group": dict(
        scope="group", size=64, score="relu2", feature_map="identity", combine="none", conv_width=32
    ),
}


def fused_launches(form, chip, width, monkeypatch, dtype=torch.bfloat16, **parts):
    """Record the launches of a text's first and second part."""
    recorders = recorded(chip, FUSED["sliding"] | FUSED[form], monkeypatch)
    geometry = dict(heads=4, kv_heads=2, key_dim=width, value_dim=width, scale=width**-0.5)
    attention = LinearAttention(Equation(**geometry, **FUSED_FORMS[form] | parts))
    eq = attention.equation
    plan = Prefill("triton", FORMS[eq.scope, eq.score, eq.combine], 64, dtype, is_fused=True)
    q, k, v = (torch.empty(1, 200, heads, width, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
    with torch.no_grad():
        plan(attention, None, 0, q, k, v)
        plan(attention, attention.empty_state(1, "cpu", dtype), 200, q, k, v)
    return launched(recorders)


@pytest.mark.parametrize(
    "form, chip, width",
    [
        pytest.param(form, chip, width, marks=() if (chip, width) == (90, 128) else pytest.mark.slow)
        for form in FUSED
        for chip in SHARED
        for width in (64, 128)
    ],
)
def test_fused_kernels_fit(form, chip, width, monkeypatch, tmp_path):
    some = fused_launches(form, chip, width, monkeypatch)
    assert {kernel.__name__ for kernel, _ in some} == FUSED[form].keys()
    check_fit(some, chip, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, feature_map", [("sliding", "relu"), ("sliding", "elu"), ("group", "hedgehog")]
)
@pytest.mark.parametrize("width", [40, 128])
def test_other_fused_kernels_compile(form, feature_map, width, monkeypatch):
    """Cases: other maps, odd widths, fp16, no conv, and features per query head."""
    parts = dict(feature_map=feature_map, conv_width=0, per_query_head=True, feature_dim=48)
    for kernel, values in fused_launches(form, 90, width, monkeypatch, torch.float16, **parts):
        assert compiled(kernel, values, 90).metadata.shared <= SHARED[90], kernel.__name__


NODE_FORMS = {
    "sliding": NODE_SLIDING | dict(size=64, conv_width=32, sinks=4),
    "group": NODE_GROUP | dict(size=64, conv_width=32),
}


@pytest.mark.parametrize(
    "form, chip, width",
    [
        pytest.param(form, chip, width, marks=() if (chip, width) == (90, 128) else pytest.mark.slow)
        for form in NODE_FORMS
        for chip in SHARED
        for width in (64, 128, 256)
    ],
)
def test_node_kernels_fit(form, chip, width, monkeypatch, tmp_path):
    parts = NODE_FORMS[form]
    if form == "sliding":
        parts = parts | dict(feature_dim=min(width, 128))
    some = node_launches(chip, monkeypatch, parts, width, torch.bfloat16)
    assert [kernel.__name__ for kernel, _ in some] == ["take_in"] * 2 + ["attend_nodes"] * 2 + ["fold_path"]
    check_fit(some, chip, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "parts",
    [
        dict(size=70, combine="shared"),
        NODE_SLIDING | dict(size=70, conv_width=71, feature_dim=24, per_query_head=True),
        NODE_GROUP | dict(size=70, conv_width=0),
    ],
)
@pytest.mark.parametrize("width", [40, 256])
def test_other_nodes_compile(parts, dtype, width, monkeypatch):
    """Cases: no far part, no conv, features per query head, and fp32, which may spill."""
    for kernel, values in node_launches(89, monkeypatch, parts, width, dtype):
        assert compiled(kernel, values, 89).metadata.shared <= SHARED[89], kernel.__name__


@pytest.mark.parametrize(
    "chip, kernels, case",
    [
        (90, SLIDING, dict(far=False, width=0, sinks=0, keys=64, values=64)),
        (90, SLIDING, dict(ahead=64, far=False, sinks=0, keys=64, values=64)),
        (90, GROUP, dict(far=False, width=0, keys=64, values=64)),
        (90, SLIDING, dict(packed=True, far=False, sinks=0, keys=64, values=64)),
        (90, GROUP, dict(packed=True, far=False, keys=64, values=64)),
        pytest.param(
            80,
            GROUP,
            dict(dtype=torch.float16, group=2, recent=70, width=71, keys=24, values=40, features=48),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            80,
            SLIDING,
            dict(dtype=torch.float16, group=2, size=50, keys=24, values=40, features=48),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            80,
            SLIDING,
            dict(ahead=74, recent=54, dtype=torch.float16, group=2, size=50, keys=24, values=40, features=48),
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(
                89, kernels, dict(dtype=torch.float32, keys=x, values=x, features=128), marks=pytest.mark.slow
            )
            for kernels in (SLIDING, GROUP)
            for x in (64, 128, 256)
        ),
    ],
)
def test_other_launches_compile(chip, kernels, case, monkeypatch):
    """Cases: no far part, no conv, odd sizes, and fp32, which may spill."""
    for kernel, values in launches(chip, kernels, monkeypatch, **case):
        assert compiled(kernel, values, chip).metadata.shared <= SHARED[chip], kernel.__name__

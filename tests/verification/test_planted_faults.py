"""Each fault is small and real: `verify` fails, and names the check."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import swapped
from linearize_kernels.equation import Equation
from linearize_kernels.parts.far import FeatureMemory
from planted_faults import FAULTS, GROUPS, Fault, forget_layouts
from verify_case import check

from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime import tree
from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.layer import LinearizedAttention, equation
from linearize_cli.runtime.tree import LinearBranch
from linearize_cli.speculative.accept import Greedy, Sampling
from linearize_cli.verification import verify as verification
from linearize_cli.verification.drift import LIMIT, state_errors
from linearize_cli.verification.sampling import sampling

attend, commit, append = LinearBranch.attend, LinearBranch.commit, LinearCacheLayer.append


@pytest.fixture(autouse=True)
def new_layouts():
    """A fault must not leave its layouts to the tests that follow."""
    forget_layouts()
    yield
    forget_layouts()


@pytest.fixture
def model():
    return swapped("llama", num_hidden_layers=2)


@pytest.fixture
def in_trees(monkeypatch):
    """Puts a fault in the place of a method while a converted layer reads a tree."""

    def plant(cls, name, fault):
        @contextmanager
        def planted():
            with monkeypatch.context() as patched:
                patched.setattr(cls, name, fault)
                yield

        def faulty(self, *args):
            with planted():
                return attend(self, *args)

        monkeypatch.setattr(LinearBranch, "attend", faulty)

    return plant


def test_the_crossing_group_is_dropped(in_trees, tokenizer):
    """The seed's own fault: a group that is complete but not folded yet is neither near nor far."""
    read = FeatureMemory.forward

    def dropped(self, q, k, v, position, seen, far, new, S, z):
        if not new:  # no node crosses an edge
            return read(self, q, k, v, position, seen, far, new, S, z)
        far, committed = far.clone(), position[..., :-new]
        just = committed // 8 == committed.amax(-1, keepdim=True) // 8
        far[..., :-new] &= ~just[..., None, :]
        return read(self, q, k, v, position, seen, far, new, S, z)

    in_trees(FeatureMemory, "forward", dropped)
    report = check(swapped("llama", GROUPS, num_hidden_layers=2), tokenizer)
    assert report["verdict"] == "FAIL" and "tree" in report["failed"]
    limit = report["limits"]["tree"]
    assert report["tree"]["inside_max_abs_diff"] < limit < report["tree"]["crossing_max_abs_diff"]


def test_a_window_off_by_one_in_trees(in_trees, model, tokenizer):
    near = Equation.near

    def one_less(self, query_position, key_position):
        return near(replace(self, size=self.size - 1), query_position, key_position)

    in_trees(Equation, "near", one_less)
    report = check(model, tokenizer)
    assert report["verdict"] == "FAIL" and "tree" in report["failed"]


def test_positions_by_storage_index(model, tokenizer, monkeypatch):
    ancestors = tree.ancestors

    def by_index(parents):
        visible, depth = ancestors(parents)
        return visible, torch.arange(len(depth))

    monkeypatch.setattr(tree, "ancestors", by_index)
    report = check(model, tokenizer)
    assert report["verdict"] == "FAIL" and "tree" in report["failed"]


@pytest.mark.parametrize("name", ["recent_v", "z", "recent_position", "count"])
def test_a_commit_that_leaves_a_part_behind(name, model, tokenizer, monkeypatch):
    """`recent_v` is the conv's tail."""

    def stale(self, nodes, valid):
        before = getattr(self.prefix.state, name)
        commit(self, nodes, valid)
        self.prefix.state = replace(self.prefix.state, **{name: before})

    monkeypatch.setattr(LinearBranch, "commit", stale)
    report = check(model, tokenizer)
    assert report["verdict"] == "FAIL" and "rollback" in report["failed"]
    assert not {"tree", "prefill_vs_decode", "padding"} & set(report["failed"])


def test_a_tree_that_writes_the_state(model, tokenizer, monkeypatch):
    def writes(self, *args):
        self.state.S.mul_(1.001)
        return attend(self, *args)

    monkeypatch.setattr(LinearBranch, "attend", writes)
    report = check(model, tokenizer)
    assert report["verdict"] == "FAIL" and "rollback" in report["failed"]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_state_in_half_precision(narrow, model, tokenizer, monkeypatch):
    def rounded(self, attention, state, *args):
        append(self, attention, replace(state, S=state.S.to(narrow).float()), *args)

    monkeypatch.setattr(LinearCacheLayer, "append", rounded)
    report = check(model, tokenizer)
    assert report["verdict"] == "FAIL" and "drift" in report["failed"]
    assert report["drift"][-1]["state_rel_error"] > 3 * report["limits"]["drift"]


@pytest.mark.parametrize("method", ["augmented", "retention", "gated-delta", "linformer"])
@torch.no_grad()
def test_the_drift_of_a_sum_tells_its_precision(method, monkeypatch):
    """Check states that grow, forget, correct themselves or are projected: at least tenfold on either side."""
    overrides = ["attention.local.size=16"] if method == "augmented" else []
    recipe = load_recipe(method, overrides).to_dict()["attention"]
    torch.manual_seed(0)
    geometry = dict(heads=4, kv_heads=2, key_dim=8, value_dim=8, scale=8**-0.5)
    attention = LinearizedAttention(equation(recipe, geometry))
    for parameter in attention.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    k, v = torch.randn(2, 1, 2, 300, 8)

    def worst() -> float:
        return max(row["state_rel_error"] for row in state_errors(attention, k, v, [96, 300]))

    def rounded(self, attention, state, *args):
        append(self, attention, replace(state, S=state.S.bfloat16().float()), *args)

    assert worst() < LIMIT / 10
    monkeypatch.setattr(LinearCacheLayer, "append", rounded)
    assert worst() > LIMIT * 10
    monkeypatch.setattr(LinearCacheLayer, "append", append)
    attention, k, v = attention.double(), k.double(), v.double()
    assert worst() < 1e-13


def test_an_acceptance_that_believes_the_drafter(model, tokenizer, monkeypatch):
    rule = Greedy.__call__

    def believes(self, logits, ids, parents):
        accepted, tokens = rule(self, logits, ids, parents)
        return torch.ones_like(accepted), tokens

    monkeypatch.setattr(Greedy, "__call__", believes)
    report = check(model, tokenizer, prompts=["abcabcab", "1, 2, 1, 2,"], max_new=12)
    assert (report["verdict"], report["failed"]) == ("FAIL", ["greedy"])
    assert report["greedy"]["first_divergence"]["margin"] > report["limits"]["greedy"]


def test_a_temperature_that_counts_twice(model, tokenizer, monkeypatch):
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda self, logits: draw(self, logits / 0.6))
    report = check(model, tokenizer)
    assert (report["verdict"], report["failed"]) == ("FAIL", ["sampling"])


SOUND: dict[
    tuple, list[str]
] = {}  # what fails without a fault, by check and model: a fault's neighbours share it


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_one_changed_line(fault: Fault, tokenizer, monkeypatch):
    """The check that the fault belongs to passes without it and fails with it."""
    changes = {} if fault.family in ("falcon-alibi", "falcon-h1") else {"num_hidden_layers": 2}
    model = swapped(fault.family, fault.attention, fault.keep, **changes).to(fault.dtype)
    every = verification.DECODING | verification.THOROUGH | {"sampling": sampling}
    monkeypatch.setattr(verification, "DECODING", {fault.check: every[fault.check]})
    for name in ("THOROUGH", "MEASURING", "STRICT"):
        monkeypatch.setattr(verification, name, {})
    kind = fault.check, str(fault.attention), fault.family, fault.keep
    if kind not in SOUND:
        SOUND[kind] = check(model, tokenizer, quick=False)["failed"]
    assert SOUND[kind] == []
    fault.plant(monkeypatch)
    forget_layouts()
    report = check(model, tokenizer, quick=False)
    assert report["verdict"] == "FAIL" and report["failed"]


ALSO_CONVERTED = (
    "augmented:flash",
    "augmented:linformer",
    "lolcats",
    "retention",
)  # and verified, by convert's tests


@pytest.mark.parametrize(
    "method",
    ["augmented", "gated-delta", *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO_CONVERTED)],
)
def test_untouched_methods_are_exact(method, tokenizer, monkeypatch):
    """Under every check but the speed's."""
    local = ["attention.local.size=8"] if load_recipe(method).attention.local else []
    monkeypatch.setattr(verification, "MEASURING", {"sampling": sampling})
    model = swapped("llama", load_recipe(method, local).to_dict()["attention"], num_hidden_layers=2)
    report = check(model, tokenizer, quick=False)
    assert (report["verdict"], report["failed"]) == ("EXACT", [])

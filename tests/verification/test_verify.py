"""`verify` calls honest models exact, and names the check that a planted fault breaks."""

import json
import re
from dataclasses import replace

import encoders
import pytest
import torch
from families import AUGMENTED, swapped, tiny_model
from linearize_kernels.equation import Equation
from planted_faults import GROUPS, forget_layouts
from rich.console import Console
from verify_case import check

from linearize_cli.errors import UserError
from linearize_cli.runtime import layer as runtime_layer
from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.verification import verify as verification
from linearize_cli.verification.prompts import read_prompts
from linearize_cli.verification.report import render
from linearize_cli.verification.verify import verify

KEYS = {
    *("verdict", "tree", "forms", "greedy", "rollback", "padding", "drift", "acceptance", "speed", "seed"),
    *("versions", "noise", "dtype", "failed", "limits", "sampling", "checks", "rows", "drafts", "definition"),
    *("long", "code", "files", "fingerprint", "float32"),
}
append = LinearCacheLayer.append


@pytest.fixture(autouse=True)
def only_checks(request, monkeypatch):
    """Measuring takes a second, and few tests are about it."""
    if request.node.name not in ("test_report", "test_render"):
        monkeypatch.setattr(verification, "MEASURING", {})


@pytest.fixture(scope="module")
def llama():
    return swapped("llama", num_hidden_layers=2)


@pytest.mark.parametrize(
    "attention, keep, dtype",
    [
        (AUGMENTED, 0, torch.float64),
        (AUGMENTED, 0, torch.bfloat16),
        (AUGMENTED, 1, torch.float32),
        (GROUPS, 0, torch.float32),
        ({"far": {"feature_map": "relu"}}, 0, torch.float32),
    ],
)
def test_honest_models_are_exact(attention, keep, dtype, tokenizer):
    report = check(swapped("llama", attention, keep, num_hidden_layers=2).to(dtype), tokenizer)
    assert (report["verdict"], report["failed"]) == ("EXACT", [])
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    none = {"prompts": 3, "tokens": 18, "mismatches": 0, "first_divergence": None, "draft": "lookup"}
    assert report["greedy"] == none


def test_report(llama, tokenizer):
    started = []
    report = check(llama, tokenizer, seed=5, quick=False, progress=started.append)
    assert (report["verdict"], set(report)) == ("EXACT", KEYS)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report["tree"]) >= {"max_abs_diff", "crossing_max_abs_diff", "offsets_swept", "nodes"}
    assert (report["tree"]["offsets_swept"], report["tree"]["nodes"]) == (8, 64)
    assert all(0 <= row["state_rel_error"] < 1e-5 for row in report["drift"]) and len(report["drift"]) == 3
    depths = report["acceptance"]["by_depth"]
    assert depths == sorted(depths, reverse=True)
    assert report["acceptance"]["mean"] == pytest.approx(1 + sum(depths))
    speed = report["speed"]
    ratio = speed["speculative_tokens_per_s"] / speed["plain_tokens_per_s"]
    assert speed["ratio"] == pytest.approx(ratio) == report["acceptance"]["mean"] / speed["step_cost"]
    assert report["sampling"]["tokens"] >= 1024 and report["sampling"]["p_value"] > 1e-4
    assert set(report["forms"]) == {"prefill_vs_decode", "chunked_vs_decode"}
    assert set(report["rollback"]) == set(report["padding"]) == {"max_abs_diff"}
    assert report["seed"] == 5
    assert {"python", "torch", "transformers"} < set(report["versions"])
    checks = (verification.DECODING, verification.THOROUGH, verification.MEASURING)
    assert started == ["noise", *(name for part in checks for name in part)]


def test_honest_families(tokenizer):
    """With a kept softmax layer, learned positions, and a window of the base model's own."""
    for family, keep in (("llama", 1), ("gpt2", 0), ("mistral", 1)):
        report = check(swapped(family, keep=keep, num_hidden_layers=2), tokenizer)
        assert (report["verdict"], report["failed"]) == ("EXACT", []), family


def test_honest_models_of_odd_kinds(tokenizer):
    """A pruned layer, whose state stays zero; a kept layer with a table of positions; attention to an encoder."""
    pruned = swapped("llama", num_hidden_layers=2)
    with torch.no_grad():
        pruned.model.layers[0].self_attn.v_proj.weight.zero_()
    report = check(pruned, tokenizer)
    assert (report["verdict"], report["failed"]) == ("EXACT", [])
    report = check(swapped("mpt", keep=1), tokenizer, quick=False)
    assert (report["verdict"], report["failed"]) == ("EXACT", [])
    for family in ("bart", "t5"):
        model = encoders.swapped(family, {**AUGMENTED, "cross": "linear"})
        words = encoders.tokenizer(sentinels=True)
        report = check(model, words, prompts=["word1 word2 word3", "word7"], quick=False)
        assert (report["verdict"], report["failed"]) == ("EXACT", []), family


@pytest.mark.parametrize(
    "family, why",
    [("lfm2", "cannot branch"), ("qwen3-next", "cannot branch"), ("gpt-neo", "4-D mask|hides or biases")],
)
def test_models_that_read_no_trees(family, why, tokenizer):
    """Check that impossible checks are null, and that the table says why."""
    report = check(swapped(family, keep=1), tokenizer)
    # On some machines, the forms of Qwen3-Next's own delta rule differ by more than rounding does elsewhere.
    assert json.dumps(report) and (report["verdict"] == "EXACT" or family == "qwen3-next")
    assert all(report[key] is None for key in ("tree", "sampling", "acceptance", "speed"))
    assert report["greedy"]["draft"] is None and report["drift"]
    lines = {line["name"]: line["measured"] for line in report["checks"]}
    assert re.search(why, lines["tree"]) and re.search(why, lines["greedy"])


def stale_conv_tail(self, attention, state, *args):
    append(self, attention, replace(state, recent_v=torch.zeros_like(state.recent_v)), *args)


def narrow_sum(self, attention, state, *args):
    append(self, attention, replace(state, S=state.S.bfloat16().float()), *args)


def test_conv_that_forgets_its_past(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(LinearCacheLayer, "append", stale_conv_tail)
    report = check(llama, tokenizer)
    assert report["verdict"] == "FAIL"
    assert {"prefill_vs_decode", "padding"} <= set(report["failed"])


@pytest.fixture
def new_layouts():
    forget_layouts()
    yield
    forget_layouts()


def test_window_off_by_one_in_decoding(llama, tokenizer, monkeypatch, new_layouts):
    near = Equation.near

    def one_less(self, query_position, key_position):
        own = replace(self, size=self.size - 1) if query_position.shape[-1] == 1 else self
        return near(own, query_position, key_position)

    monkeypatch.setattr(Equation, "near", one_less)
    report = check(llama, tokenizer)
    assert report["verdict"] == "FAIL"
    assert {"prefill_vs_decode", "chunked_vs_decode", "padding"} <= set(report["failed"])


def test_pads_that_count_as_tokens(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(runtime_layer, "valid_tokens", lambda *args: None)
    report = check(llama, tokenizer)
    # Without a cache and a mask, positions that start again behind pads are those of packed documents.
    assert report["verdict"] == "FAIL" and {"padding", "greedy"} <= set(report["failed"])


@pytest.mark.parametrize("keep", [0, 1])
def test_crop_that_forgets_to_restore(keep, tokenizer, monkeypatch):
    def crop(self, tokens_to_remove):
        self.seen += tokens_to_remove
        self.forget()

    monkeypatch.setattr(LinearCacheLayer, "crop", crop)
    report = check(swapped("llama", keep=keep, num_hidden_layers=2), tokenizer)
    assert (report["verdict"], report["failed"]) == ("FAIL", ["rollback"])


def test_crop_that_takes_back_one_too_few(llama, tokenizer, monkeypatch):
    replay = LinearCacheLayer.replay
    monkeypatch.setattr(
        LinearCacheLayer, "replay", lambda self, attention, length: replay(self, attention, length + 1)
    )
    assert check(llama, tokenizer)["failed"] == ["rollback"]


def test_sums_in_half_precision(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(LinearCacheLayer, "append", narrow_sum)
    report = check(llama, tokenizer)
    assert report["verdict"] == "FAIL"
    assert {"prefill_vs_decode", "drift"} <= set(report["failed"])


def test_nan_in_decoding(llama, tokenizer, monkeypatch):
    def nan(self, attention, state, *args):
        append(self, attention, replace(state, S=state.S * float("nan")), *args)

    monkeypatch.setattr(LinearCacheLayer, "append", nan)
    report = check(llama, tokenizer)
    assert "prefill_vs_decode" in report["failed"]
    json.dumps(report, allow_nan=False)


@pytest.fixture(scope="module")
def precise(tokenizer):
    """A model in fp64, and its noise."""
    model = swapped("llama", num_hidden_layers=2).double()
    return model, check(model, tokenizer)["noise"]


@pytest.mark.parametrize(
    "lead, cached_lead, verdict",
    [(0, 0, "EXACT"), (0, 3, "NUMERICAL_TIE"), (3, 3, "NUMERICAL_TIE"), (30, 30, "FAIL")],
)
def test_ties(lead, cached_lead, verdict, precise, tokenizer):
    """Two tokens share the largest logit, but for a lead of so many times the noise: without a cache the
    first's, with one the second's. All of it is far below the limits of the other checks.
    """
    model, noise = precise

    def hook(module, args, kwargs, output):
        output.logits[..., 7] = output.logits[..., 8] = output.logits.amax(-1)
        cached = kwargs["past_key_values"] is not None
        output.logits[..., 8 if cached else 7] += noise * (cached_lead if cached else lead)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    report = check(model, tokenizer, prompts=["A", "b"] * 5, max_new=2)
    handle.remove()
    assert report["verdict"] == verdict
    assert report["failed"] == (["greedy"] if verdict == "FAIL" else [])
    assert report["greedy"]["mismatches"] == (20 if cached_lead else 0)
    if cached_lead:
        first = report["greedy"]["first_divergence"]
        assert (first["prompt"], first["position"]) == (0, 0)
        assert first["margin"] == pytest.approx(lead * noise, rel=0.1)


def test_render(llama, tokenizer):
    def shown(report) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(render(report))
        return capture.get()

    report = check(llama, tokenizer)
    text = shown(report)
    assert "EXACT: all forms of the model agree within the rounding of float32" in text
    assert "prefill vs decode" in text and f"{report['padding']['max_abs_diff']:.1e}" in text
    assert "Speculation (lookup)" in text and "on this machine" in text
    broken = report | {"verdict": "FAIL", "failed": ["padding"]}
    assert "FAIL: these checks failed: padding" in shown(broken)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, llama, tokenizer):
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "linearize.json").write_text("{}")
    return folder


def test_artifact(artifact, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\n\nA dog\n")
    report = verify(artifact, prompts=prompts, max_new=3, dtype="float64")
    assert (report["verdict"], report["dtype"]) == ("EXACT", "float64")
    assert report["greedy"]["tokens"] == 6
    assert json.loads((artifact / "verify.json").read_text()) == report
    assert not list(artifact.glob("*.partial"))
    (artifact / "verify.json").unlink()
    verify(artifact, prompts=prompts, max_new=1, write=False)
    assert not (artifact / "verify.json").exists()


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        verify(*args, **kwargs)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_what_is_no_artifact_is_refused(artifact, tmp_path, tokenizer):
    assert "is not a folder" in refusal(tmp_path / "absent")
    assert "it has no config.json" in refusal(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert "config.json describes a llama model" in said and "linearize convert" in said
    (tmp_path / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refusal(tmp_path)


def test_broken_weights_are_refused(artifact, tmp_path):
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors cannot be read" in refusal(tmp_path)


def test_prompts(tmp_path, artifact):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "one\\ntwo"}\n{"text": "three"}\n')
    assert read_prompts(file) == ["one\ntwo", "three"]
    file.write_text('{"prompt": "one"}\n')
    said = refusal(artifact, prompts=file)
    assert "line 1" in said and "--skip-bad-rows" not in said
    file.write_bytes(b"\xef\xbb\xbf" + b'{"text": "cut \\ud83d"}\n')
    assert read_prompts(file) == ["cut \ufffd"]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert read_prompts(tmp_path / "bom.txt") == ["one"]
    assert "no such file" in refusal(artifact, prompts=tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert "has no prompt" in refusal(artifact, prompts=tmp_path / "empty.txt")


def test_context_limits_what_is_generated(llama, tokenizer):
    for max_new in (0, 256):
        with pytest.raises(UserError, match="the model's context is 256"):
            check(llama, tokenizer, max_new=max_new)
    with pytest.raises(UserError, match="the prompts have no token"):
        check(llama, tokenizer, prompts=[""])
    report = check(llama, tokenizer, prompts=["x" * 300], max_new=4)
    assert (report["verdict"], report["greedy"]["tokens"]) == ("EXACT", 4)


def test_softmax_model_is_refused(tokenizer):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no converted layer"):
        check(model, tokenizer)

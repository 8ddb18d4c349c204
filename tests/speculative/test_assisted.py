"""Pairs of models that draft for each other: the target's own tokens, whatever the drafter; weights held once."""

import json
import shutil

import pytest
import torch
from convert_case import make_teacher, run
from safetensors.torch import load_file, save_file
from tiny_checkpoint import edit_json, save_tokenizer, tiny_model
from token_trees import random_ids

from linearize_cli import load
from linearize_cli.errors import UserError
from linearize_cli.models.decoding import forward
from linearize_cli.models.load import load_teacher
from linearize_cli.speculative.assisted import (
    acceptance,
    assisted,
    break_even,
    by_depth,
    measured_costs,
    speedup,
)
from linearize_cli.speculative.decode import Step
from linearize_cli.speculative.pairs import drafted_by, drafting_for_teacher

PROMPTS = [[1], [1, 5, 5, 3, 0, 4, 4, 3, 5, 0, 3], [1, *[4, 3, 5, 0, 3, 3] * 6]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("assisted"))


@pytest.fixture(scope="module")
def kept(teacher):
    """An artifact with its adapter."""
    run(teacher, teacher.folder / "kept", keep_adapter=True)
    return teacher.folder / "kept"


@pytest.fixture(scope="module")
def hybrid(teacher):
    """One with its adapter and a softmax layer, in groups."""
    options = dict(method="augmented:flash", overrides=("attention.local.size=4",))
    run(teacher, teacher.folder / "hybrid", keep_softmax="at:1", keep_adapter=True, **options)
    return teacher.folder / "hybrid"


@pytest.fixture(scope="module")
def merged(teacher):
    """One without its adapter."""
    run(teacher, teacher.folder / "merged")
    return teacher.folder / "merged"


@torch.no_grad()
def greedy(model, prompt, max_new, stop=()):
    """Without any cache."""
    row = list(prompt)
    while len(row) < len(prompt) + max_new and not (len(row) > len(prompt) and row[-1] in stop):
        row.append(int(forward(model, torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


def new_tokens(steps):
    return [token for step in steps for token in step.tokens[0]]


def storages(model):
    return {p.data_ptr() for p in (*model.parameters(), *model.buffers())}


def is_own(name):
    """Return True if the conversion added a parameter."""
    return "linear_attention" in name or "lora_" in name


@pytest.mark.parametrize("which", ["kept", "hybrid"])
def test_all_but_the_conversion_s_own_is_held_once(which, request, teacher):
    artifact = request.getfixturevalue(which)
    pair = drafting_for_teacher(artifact)
    assert pair.shared
    theirs = storages(pair.target)
    own = {name: p for name, p in pair.drafter.named_parameters() if is_own(name)}
    base = {name: p for name, p in pair.drafter.named_parameters() if not is_own(name)}
    assert base and own and all(p.data_ptr() in theirs for p in base.values())
    assert not any(p.data_ptr() in theirs for p in own.values())
    held = {
        p.data_ptr(): p.nbytes for model in (pair.target, pair.drafter) for p in model.parameters()
    }  # each storage once
    alone = sum(p.nbytes for p in load_teacher(teacher.path)[0].parameters())
    assert sum(held.values()) == alone + sum(p.nbytes for p in own.values())


@pytest.mark.parametrize("which", ["kept", "hybrid"])
def test_the_drafter_beside_its_teacher_is_the_artifact(which, request, teacher):
    pair, ids = drafting_for_teacher(request.getfixturevalue(which)), random_ids(3, 40) % 6
    artifact, original = load(request.getfixturevalue(which))[0], load_teacher(teacher.path)[0]
    with torch.no_grad():
        # Merging rounds the weights, and unit norms make more of it.
        torch.testing.assert_close(forward(pair.drafter, ids), forward(artifact, ids), atol=5e-4, rtol=0.0)
        assert torch.equal(forward(pair.target, ids), forward(original, ids))
        assert (forward(pair.drafter, ids) - forward(original, ids)).abs().max() > 0.01
    assert not pair.target.training and not pair.drafter.training


def test_without_the_adapter_they_lie_side_by_side(merged, teacher):
    pair = drafting_for_teacher(merged)
    assert not pair.shared and not storages(pair.target) & storages(pair.drafter)
    assert drafting_for_teacher(merged, teacher.path).target.name_or_path == teacher.path


@pytest.mark.parametrize("drafted", [1, 5])
@pytest.mark.parametrize("which", ["kept", "hybrid", "merged"])
def test_the_teacher_s_tokens_whatever_its_drafter(which, drafted, request):
    pair = drafting_for_teacher(request.getfixturevalue(which))
    for prompt in PROMPTS:
        seen = []
        steps = assisted(pair, prompt, 24, drafted=drafted, report=seen.append)
        assert new_tokens(steps) == greedy(pair.target, prompt, 24) and seen == steps
        assert all(step.accepted[0] < step.nodes <= drafted + 1 for step in steps)


@pytest.mark.parametrize("which", ["merged", "hybrid"])
def test_the_artifact_s_tokens_whatever_its_drafter(which, request, teacher, kept):
    artifact = request.getfixturevalue(which)
    for drafter in (teacher.path, str(kept), str(artifact)):
        pair = drafted_by(artifact, drafter)
        for prompt in PROMPTS:
            steps = assisted(pair, prompt, 24)
            assert new_tokens(steps) == greedy(pair.target, prompt, 24)
    # The artifact drafts for itself: all is accepted, but for where the room ends.
    assert acceptance(steps) == 1 and all(step.accepted[0] == step.nodes - 1 for step in steps)


def test_a_stop_inside_a_draft_ends_the_row(merged):
    pair = drafted_by(merged, str(merged))
    prompt, whole = PROMPTS[1], greedy(pair.target, PROMPTS[1], 40)
    for stop in set(whole):
        tokens = new_tokens(assisted(pair, prompt, 40, stop=[stop]))
        assert tokens == whole[: whole.index(stop) + 1] == greedy(pair.target, prompt, 40, [stop])


def test_the_model_s_own_ways_to_generate_do_not_count(merged):
    pair = drafted_by(merged, str(merged))
    pair.target.generation_config.update(repetition_penalty=3.0, top_k=1, do_sample=True)
    before = [model.generation_config.to_dict() for model in (pair.target, pair.drafter)]
    assert new_tokens(assisted(pair, PROMPTS[1], 40)) == greedy(pair.target, PROMPTS[1], 40)
    assert [model.generation_config.to_dict() for model in (pair.target, pair.drafter)] == before


def test_positions_end(merged):
    pair = drafted_by(merged, str(merged))
    pair.drafter.register_buffer("places", torch.zeros(256))  # a table of positions
    with pytest.raises(
        UserError, match="250 prompt tokens and 7 new ones exceed the 256 positions of Linear"
    ):
        assisted(pair, [1] * 250, 7)


def test_depths_are_counted():
    """Chains of 3, accepted 3, 1, 0; one of 1, accepted; a step without a draft and one of a row that has ended."""
    lengths, accepted = (3, 3, 3, 1, 0), (3, 1, 0, 1, 0)
    steps = [Step([[7] * (n + 1)], [n], length + 1) for length, n in zip(lengths, accepted, strict=True)]
    steps.append(Step([[]], [None], 4))
    assert by_depth(steps) == ([4, 2, 1], [3, 1, 1])
    assert acceptance(steps) == 5 / 7
    assert by_depth([]) == ([], []) and acceptance([]) == 0


def test_what_a_pair_gains_follows_the_formula():
    for alpha, drafted, cost, expected in (
        (0.8, 4, 1.0, 0.672),
        (0.8, 4, 0.48, 1.151),
        (0.8, 4, 0.34, 1.425),
    ):
        formula = (1 - alpha ** (drafted + 1)) / ((1 - alpha) * (drafted * cost + 1))
        assert speedup(alpha, drafted, cost) == pytest.approx(formula) == pytest.approx(expected, abs=1e-3)
    assert speedup(1.0, 3, 0.0) == 4 and speedup(0.0, 3, 0.5) == 1 / 2.5
    assert speedup(0.5, 1, 0.5, 1.5) == 1.5 / 2
    for drafted, cost, verification in ((4, 0.3, 1.0), (1, 0.9, 1.0), (5, 0.1, 2.5)):
        alpha = break_even(drafted, cost, verification)
        assert speedup(alpha, drafted, cost, verification) == pytest.approx(1)
        assert speedup(alpha - 1e-3, drafted, cost, verification) < 1
    assert break_even(4, 1.01) is None and break_even(4, 0.5, 4.0) is None
    assert break_even(4, 1.0) == pytest.approx(1) and break_even(4, 0.0) == pytest.approx(0, abs=1e-9)


def test_costs_are_measured(kept):
    cost, verification = measured_costs(drafting_for_teacher(kept), PROMPTS[1], repeats=3)
    assert 0.05 < cost < 100 and 0.05 < verification < 100


def copied(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def test_what_does_not_fit_is_refused(teacher, kept, merged, tmp_path):
    other = tmp_path / "gpt2"
    tiny_model("gpt2", vocab_size=6).save_pretrained(other)
    save_tokenizer(other)
    with pytest.raises(UserError, match="is a GPT2LMHeadModel, but .* was made from a LlamaForCausalLM"):
        drafting_for_teacher(kept, str(other))
    wider = tmp_path / "wider"
    tiny_model(vocab_size=7).save_pretrained(wider)
    save_tokenizer(wider)
    with pytest.raises(UserError, match=r"another vocabulary \(7\) than .* \(6\)"):
        drafted_by(merged, str(wider))
    deeper = tmp_path / "deeper"
    tiny_model(hidden_size=32).save_pretrained(deeper)
    save_tokenizer(deeper)
    with pytest.raises(UserError, match=r"the adapter cannot be loaded: [\s\S]*size mismatch"):
        drafting_for_teacher(kept, str(deeper))
    with pytest.raises(UserError, match="no teacher for .* is already a linearized model"):
        drafting_for_teacher(kept, str(merged))
    with pytest.raises(UserError, match="not a linearized one"):
        drafted_by(teacher.path, str(kept))
    with pytest.raises(UserError, match="is a llama model, not a linearized one"):
        drafting_for_teacher(teacher.path)


def test_damaged_artifacts_are_refused(kept, tmp_path):
    folder = copied(kept, tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "linear_attention" in name)
    save_file({name: w for name, w in weights.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(UserError, match="not those that were saved: changed: model.safetensors"):
        drafting_for_teacher(folder)
    with pytest.raises(UserError, match=f"lacks the weights {gone}"):
        drafting_for_teacher(folder, checksums=False)
    folder = shutil.copytree(kept, folder, dirs_exist_ok=True)
    adapter = folder / "adapter" / "adapter_model.safetensors"
    lora = load_file(adapter)
    save_file({name: w for name, w in lora.items() if name != next(iter(lora))}, adapter)
    with pytest.raises(UserError, match="and the model do not fit: .*lora_"):
        drafting_for_teacher(folder, checksums=False)
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(UserError, match="adapter"):
        drafting_for_teacher(folder, checksums=False)
    shutil.rmtree(folder / "adapter")
    report = json.loads((folder / "linearize.json").read_text())
    edit_json(folder / "linearize.json", base_model=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no teacher for .*no such folder"):
        drafting_for_teacher(folder, checksums=False)
    assert drafting_for_teacher(folder, report["base_model"], checksums=False).shared is False
    (folder / "linearize.json").unlink()
    with pytest.raises(UserError, match="no linearize.json with the path of its teacher"):
        drafting_for_teacher(folder)


def test_recurrent_models_are_refused(merged, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM._is_stateful", True)
    with pytest.raises(UserError, match="recurrent state"):
        drafted_by(merged, str(merged))

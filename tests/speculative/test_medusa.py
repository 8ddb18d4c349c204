"""Medusa heads: what they compute, draft, learn and keep."""

import json
import shutil

import pytest
import torch
from convert_case import make_teacher, run, stopped
from families import swapped
from safetensors.torch import load_file, safe_open, save_file
from torch.nn.functional import cross_entropy, linear, silu

from linearize_cli import load
from linearize_cli.artifact.completeness import artifact_files
from linearize_cli.conversion.heads import heads as train
from linearize_cli.errors import UserError
from linearize_cli.models.batch import IGNORED, Batch
from linearize_cli.models.encoders import Encoder
from linearize_cli.models.tasks import CausalLM
from linearize_cli.speculative.medusa import FILE, MedusaHeads, check_heads, last_hidden, load_heads
from linearize_cli.speculative.trees import NAMED, Choices, chain
from linearize_cli.training.medusa import HeadTraining

TINY = dict(heads=2, tokens=16 * 2 * 40, batch_size=2, seq_len=16)


def random_heads(count=3, width=5, vocabulary=17, has_bias=True):
    heads = MedusaHeads(count, width, vocabulary, has_bias)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return heads.requires_grad_(False)


def head_by_head(heads, hidden, k):
    """The paper's formula, of one head."""
    state = hidden + silu(linear(hidden, heads.weight[k], heads.bias[k]))
    return linear(state, heads.output[k], heads.output_bias[k])


def test_all_heads_at_once_are_each_by_itself():
    heads, hidden = random_heads(), torch.randn(4, 5)
    for k in range(3):
        torch.testing.assert_close(heads(hidden)[k], head_by_head(heads, hidden, k))


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's head has a bias
def test_new_heads_say_what_the_model_says(family):
    model, ids = swapped(family), torch.randint(3, 99, (2, 9))
    heads = MedusaHeads.of(model, 3)
    with torch.no_grad():
        logits = heads(last_hidden(model, {"input_ids": ids}).flatten(0, 1))
        expected = model(ids).logits.flatten(0, 1)
    assert (heads.output_bias is not None) == (family == "phi")
    for own in logits:
        torch.testing.assert_close(own, expected)


def test_drafts_are_the_heads_candidates_along_the_paths():
    heads, hidden = random_heads(4, 5, 17), torch.randn(2, 5)
    for tree in (NAMED["mc_sim_7b_63"], chain(4), Choices.of([[3], [3, 1], [0]]), Choices.of([])):
        draft = heads.drafter(tree).draft([[1, 2, 3], [4]], hidden)
        assert draft.ids.shape == (2, len(tree.paths) + 1) and list(draft.parents) == tree.parents
        for row, last in enumerate([3, 4]):
            assert draft.ids[row, 0] == last
            for node, path in enumerate(tree.paths, 1):
                logits = head_by_head(heads, hidden[row], len(path) - 1)
                assert draft.ids[row, node] == logits.argsort(descending=True)[path[-1]]
                assert len(path) == 1 or tree.paths[draft.parents[node] - 1] == path[:-1]


def test_answers_are_the_models_own_tokens_within_a_document():
    model, ids = swapped("llama"), torch.randint(3, 99, (3, 11))
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORED)], 1)
    labels[1, 4] = IGNORED  # a document ends
    objective = HeadTraining(model, MedusaHeads.of(model, 3), 0.8)
    hidden = last_hidden(model, {"input_ids": ids})
    with torch.no_grad():
        own = model(ids).logits.argmax(-1)
    for size in (1, 7, 100):
        answers = objective.answers(hidden, labels, size)
        for row in range(3):
            for t in range(11):
                for k in (1, 2, 3):
                    inside = t + k < 11 and all(labels[row, t + i] != IGNORED for i in range(k + 1))
                    assert answers[k - 1, row, t] == (own[row, t + k] if inside else IGNORED)


def test_the_loss_in_pieces_is_that_of_the_whole():
    model, ids = swapped("llama"), torch.randint(3, 99, (2, 13))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], 1)
    results = []
    for limit in (1 << 26, 3 * 99 * 2):
        objective = HeadTraining(model, MedusaHeads.of(model, 2), 0.5, limit)
        loss, records = objective(Batch({"input_ids": ids}, labels))
        loss.backward()
        results.append((loss, *(p.grad for p in objective.heads.parameters())))
    torch.testing.assert_close(results[0], results[1])
    with torch.no_grad():
        own, logits = model(ids).logits.argmax(-1), objective.heads(last_hidden(model, {"input_ids": ids})[0])
    expected = cross_entropy(
        torch.cat([objective.heads(h)[1][:10] for h in last_hidden(model, {"input_ids": ids})]),
        own[:, 2:12].flatten(),
    )
    torch.testing.assert_close(records["heads"]["2"].detach(), expected.detach())
    assert logits.shape == (2, 13, 99)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("medusa"))


@pytest.fixture(scope="module")
def artifact(teacher):
    output = teacher.folder / "artifact"
    run(teacher, output, medusa_heads=2)
    return output


def copied(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def log_of(folder):
    return [json.loads(line) for line in (folder / "medusa.jsonl").read_text().splitlines()]


def test_convert_trains_heads_too(artifact, teacher):
    report = json.loads((artifact / "linearize.json").read_text())
    assert report["medusa"]["heads"] == 2 and report["medusa"]["tokens"] == 16 * 4 * 20
    heads = load_heads(artifact, load(artifact)[0])
    assert report["medusa"]["tree_nodes"] == len(heads.tree.parents)
    assert len(heads.acceptance) == 2 and all(0 <= rate <= 1 for rates in heads.acceptance for rate in rates)
    assert "Medusa heads: 2" in (artifact / "README.md").read_text()
    assert FILE in artifact_files(artifact)
    records = log_of(artifact)
    assert [r["step"] for r in records] == list(range(1, 21))


@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupted_convert_goes_on_with_the_same_heads(step, artifact, teacher, monkeypatch):
    output = teacher.folder / f"stopped-{step}"
    with stopped(monkeypatch, lambda state, saves: (state.stage, state.step) == ("heads", step)):
        run(teacher, output, medusa_heads=2)
    run(teacher, output, medusa_heads=2, resume=True)
    for name in (FILE, "model.safetensors"):
        now, then = load_file(output / name), load_file(artifact / name)
        assert now.keys() == then.keys() and all(torch.equal(now[key], then[key]) for key in then), name
    assert [r["loss"] for r in log_of(output)] == [r["loss"] for r in log_of(artifact)]


def test_heads_of_an_artifact(artifact, teacher, tmp_path, monkeypatch):
    folder = copied(artifact, tmp_path)
    weights, text = (folder / "model.safetensors").read_bytes(), dict(data=(teacher.text,), **TINY)
    with pytest.raises(UserError, match="already has heads"):
        train(folder, **text)
    with pytest.raises(UserError, match="nothing to resume"):
        train(folder, **text, resume=True)
    with pytest.raises(UserError, match="too short for 4 Medusa heads"):
        train(folder, **(text | {"heads": 4}), force=True)
    facts = train(folder, **text, force=True)
    assert json.loads((folder / "linearize.json").read_text())["medusa"] == {
        k: v for k, v in facts.items() if k != "output"
    }
    assert (folder / "model.safetensors").read_bytes() == weights
    records, whole = log_of(folder), load_file(folder / FILE)
    assert len(records) == 40
    assert sum(r["loss"] for r in records[-8:]) < sum(r["loss"] for r in records[:8])
    assert not list(tmp_path.glob("*.partial")) and not list(folder.glob("*.partial"))

    (folder / FILE).unlink()
    (folder / "README.md").write_text("my own words")
    with stopped(monkeypatch, lambda state, saves: saves == 9):
        train(folder, **text)
    assert not (folder / FILE).exists() and (tmp_path / "copy.heads.partial").is_dir()
    with pytest.raises(UserError, match="--resume"):
        train(folder, **text)
    with pytest.raises(UserError, match="different values of medusa_heads"):
        train(folder, **(text | {"heads": 3}), resume=True)
    train(folder, **text, resume=True)
    again = load_file(folder / FILE)
    assert again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)
    assert (folder / "README.md").read_text() == "my own words"
    assert not list(tmp_path.glob("*.partial"))


def test_heads_are_saved_in_the_models_dtype(tmp_path):
    model = swapped("llama").bfloat16()
    model.save_pretrained(tmp_path)
    heads = MedusaHeads.of(model, 2)
    heads.acceptance, heads.tree = [[0.5, 0.25], [0.5, 0.0]], Choices.of([[0], [1], [0, 1]])
    heads.save(tmp_path, model.dtype)
    assert {x.dtype for x in load_file(tmp_path / FILE).values()} == {torch.bfloat16}
    again = load_heads(tmp_path, model)
    assert torch.equal(again.output[1], model.get_output_embeddings().weight) and not again.weight.any()
    assert again.tree == heads.tree and again.acceptance == heads.acceptance
    assert not list(tmp_path.glob("*.partial"))


def with_facts(path, **changes):
    with safe_open(path, "pt") as file:
        tensors, facts = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {key: value for key, value in (facts | changes).items() if value is not None})


def spoiled_weights(path):
    with safe_open(path, "pt") as file:
        tensors, facts = {k: file.get_tensor(k) * torch.nan for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, facts)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "has no Medusa heads"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "is damaged"),
        (
            lambda path: save_file({"weight": torch.zeros(2, 3, 3)}, path),
            "is damaged: it has no Medusa heads",
        ),
        (spoiled_weights, "is damaged: some of its weights are not finite"),
        (lambda path: with_facts(path, tree=None), "is damaged: it has no 'tree'"),
        (lambda path: with_facts(path, tree="[[0"), "is damaged"),
        (lambda path: with_facts(path, tree="[[0, 0]]"), "is damaged: .*no parent"),
        (
            lambda path: with_facts(path, tree="[[0], [0, 0], [0, 0, 0]]"),
            "its tree needs more heads or candidates",
        ),
        (lambda path: with_facts(path, tree="[[6]]"), "its tree needs more heads or candidates"),
        (lambda path: with_facts(path, heads="3"), "is damaged"),
        (lambda path: with_facts(path, acceptance="5"), "is damaged"),
    ],
)
def test_damaged_heads_are_refused(spoil, words, artifact, tmp_path):
    folder = copied(artifact, tmp_path)
    spoil(folder / FILE)
    with pytest.raises(UserError, match=words) as error:
        load_heads(folder, load(folder, checksums=False)[0])
    assert "linearize heads" in str(error.value)


def test_heads_of_another_model_are_refused(artifact):
    with pytest.raises(UserError, match="belongs to another model"):
        load_heads(artifact, swapped("llama"))


def test_models_that_cannot_verify_trees_are_refused():
    with pytest.raises(UserError, match="cannot branch off"):
        check_heads(swapped("lfm2"), CausalLM)
    with pytest.raises(UserError, match="no causal language model"):
        check_heads(swapped("llama"), Encoder)

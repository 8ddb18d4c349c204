"""`eval` on tiny artifacts: its numbers against plain computations, its refusals, its files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_case import make_teacher
from convert_case import run as convert_tiny
from encoders import WORDS, tokenizer
from encoders import tiny_model as tiny_encoder
from families import swapped
from families import tiny_model as tiny_family
from transformers import AutoTokenizer

from linearize_cli import convert, evaluate, load
from linearize_cli.artifact.record import write_record
from linearize_cli.cli import main
from linearize_cli.errors import UserError
from linearize_cli.metrics import predictions as measure
from linearize_cli.metrics.perplexity import perplexity
from linearize_cli.models.load import load_teacher
from linearize_cli.models.positions import last_position

PNG = b"\x89PNG"
KEYS = {
    *("schema", "teacher", "method", "data", "contexts", "window", "perplexity", "kl", "top1_agreement"),
    *("ablation", "recall", "passkey", "generation", "embeddings", "tasks", "dtype", "seed", "versions"),
    "sum",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def artifact(teacher):
    folder = teacher.folder / "student"
    convert_tiny(teacher, folder, tokens=16 * 4 * 5)
    return folder


@pytest.fixture(scope="module")
def report(teacher, artifact):
    return evaluate(artifact, data=teacher.text, context=(24, 37))


def tokens_of(teacher):
    own = AutoTokenizer.from_pretrained(teacher.path)
    lines = [json.loads(line)["text"] for line in Path(teacher.text).read_text().splitlines()]
    ids = [[own.bos_token_id, *own(line, add_special_tokens=False)["input_ids"]] for line in lines]
    return torch.tensor(sum(ids, []))


@torch.no_grad()
def plainly(teacher, artifact, length):
    """Per-token losses `[N, L - 1]` of both models, KL and agreement, from whole logits in double precision."""
    ids = tokens_of(teacher)
    blocks = ids[: len(ids) // length * length].view(-1, length)
    both = [
        m(input_ids=blocks).logits[:, :-1].double()
        for m in (load_teacher(teacher.path)[0], load(artifact)[0])
    ]
    p, q = (x.softmax(-1) for x in both)
    losses = [-x.gather(-1, blocks[:, 1:, None])[..., 0].log() for x in (p, q)]
    kl = (p * (p.log() - q.log())).sum(-1)
    return *losses, kl, (p.argmax(-1) == q.argmax(-1)).double()


@pytest.mark.parametrize("length", [24, 37])
def test_text_is_measured_as_defined(length, report, teacher, artifact):
    ours, theirs, kl, same = plainly(teacher, artifact, length)
    row = next(row for row in report["perplexity"]["by_context"] if row["context"] == length)
    assert row["blocks"] == len(kl)
    assert row["teacher"] == pytest.approx(ours.mean().exp().item(), rel=1e-5)
    assert row["student"] == pytest.approx(theirs.mean().exp().item(), rel=1e-5)
    assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert row["top1_agreement"] == pytest.approx(same.mean().item(), abs=1e-3)


def test_positions_are_of_the_longest_blocks(report, teacher, artifact):
    ours, theirs, *_ = plainly(teacher, artifact, 37)
    positions = report["perplexity"]["by_position"]
    assert [part["start"] for part in positions] == list(range(0, 37, 3)) and positions[-1]["end"] == 37
    for part in positions[:-1]:
        span = slice(part["start"], part["end"])
        assert part["teacher"] == pytest.approx(ours[:, span].mean().exp().item(), rel=1e-5)
        assert part["student"] == pytest.approx(theirs[:, span].mean().exp().item(), rel=1e-5)
    assert positions[-1]["teacher"] is None, "nothing follows the last token of a block"


def test_report_and_files(report, artifact):
    assert set(report) == KEYS
    assert json.loads((artifact / "eval.json").read_text()) == json.loads(json.dumps(report, allow_nan=False))
    first = report["perplexity"]["by_context"][0]
    assert (report["perplexity"]["student"], report["kl"]) == (first["student"], first["kl"])
    assert report["ablation"]["full"] == report["perplexity"]["student"]
    assert None not in report["ablation"].values() and len(set(report["ablation"].values())) == 3
    assert report["data"] == "text.jsonl" and report["contexts"]["trained"] == 16
    for name in ("perplexity", "recall", "transfer"):
        assert (artifact / f"eval-{name}.png").read_bytes().startswith(PNG)
    assert not list(artifact.glob("*.partial"))
    assert report["passkey"] is None, "this tokenizer knows no numbers"


def test_ablation_is_put_back(report, artifact, teacher):
    model, _ = load(artifact)
    from linearize_cli.metrics.ablation import without
    from linearize_cli.runtime.dispatch import converted

    with pytest.raises(RuntimeError), without(model, "far"):
        raise RuntimeError
    assert all(module.linear_attention.dropped is None for module in converted(model).values())


def test_default_contexts_reach_8_times_the_trained_length(teacher, artifact, capsys):
    report = evaluate(artifact, data=teacher.text, write=False, tokens=1000)
    assert report["contexts"]["measured"] == [16, 128]
    report = evaluate(artifact, data=teacher.text, write=False, tokens=100)
    assert report["contexts"]["measured"] == [16, 96], "as far as the text allows"


def test_long_text_is_read_in_pieces(monkeypatch):
    """Through a cache, with the same result; batches of short blocks stay whole."""
    models = [tiny_family("llama"), swapped("llama"), swapped("llama", keep=1)]
    blocks = torch.randint(3, 99, (3, 61), generator=torch.Generator().manual_seed(1))
    whole = measure.predictions(models, blocks)
    widths = []
    read = measure.read
    monkeypatch.setattr(measure, "AT_ONCE", 17)
    monkeypatch.setattr(measure, "read", lambda *x: (widths.append(y.shape[1]) or y for y in read(*x)))
    pieces = measure.predictions(models, blocks)
    assert set(widths) == {17, 61 % 17}
    for name in ("count", "loss", "kl", "same"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), atol=2e-3, rtol=2e-4)
    assert perplexity(models[1], blocks) == pytest.approx(whole.perplexity(1), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "limit"), [("llama", None), ("bloom", None), ("gpt2", 256), ("opt", 256), ("gpt-j", 256)]
)
def test_positions_that_end(family, limit):
    assert last_position(tiny_family(family)) == limit


def test_beyond_learned_positions_is_refused_and_beyond_rope_is_said(teacher, artifact, tmp_path):
    model = tiny_family("gpt2", vocab_size=6, bos_token_id=1, eos_token_id=2, n_layer=2)
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(teacher.path).save_pretrained(tmp_path / "gpt2")
    convert(str(tmp_path / "gpt2"), tmp_path / "out", train=False, overrides=("attention.local.size=4",))
    with pytest.raises(UserError, match="257 is beyond the 256 positions"):
        evaluate(tmp_path / "out", data=teacher.text, context=(257,))
    report = evaluate(tmp_path / "out", data=teacher.text, write=False, tokens=3000)
    assert report["contexts"]["measured"] == [256]
    report = evaluate(artifact, data=teacher.text, context=(300,), write=False, tokens=900)
    assert report["contexts"]["teacher"] == 256 and report["perplexity"]["student"] > 1


@pytest.mark.parametrize(
    ("family", "decodes"), [("bert", False), ("roberta-classifier", False), ("t5", True)]
)
def test_other_kinds_of_models(family, decodes, tmp_path):
    model = tiny_encoder(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(tmp_path / family)
    tokenizer(sentinels=family == "t5").save_pretrained(tmp_path / family)
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 20))
    overrides = ("attention.local.size=4", "attention.conv.width=3")
    convert(str(tmp_path / family), tmp_path / "out", train=False, seq_len=32, overrides=overrides)
    report = evaluate(tmp_path / "out", data=str(tmp_path / "text.txt"))
    assert report["kl"] > 0 and 0 <= report["top1_agreement"] <= 1
    assert report["recall"] is report["passkey"] is None and (report["generation"] is not None) == decodes
    classifier = family == "roberta-classifier"
    assert (report["perplexity"]["student"] is None) == classifier
    assert (report["perplexity"]["by_position"] is None) == (report["ablation"]["full"] is None) == classifier
    assert (tmp_path / "out" / "eval.json").exists()


@pytest.fixture()
def copy(artifact, tmp_path):
    """The artifact, to be spoilt."""
    return shutil.copytree(artifact, tmp_path / "copy")


def test_an_artifact_without_its_teacher_asks_for_it(teacher, copy):
    record = json.loads((copy / "linearize.json").read_text())
    write_record(copy, {**record, "base_model": "./moved"})
    with pytest.raises(UserError, match="moved") as refusal:
        evaluate(copy, data=teacher.text)
    assert "--teacher" in refusal.value.hint
    report = evaluate(copy, teacher=teacher.path, data=teacher.text, context=(16,), tokens=300)
    assert report["teacher"] == teacher.path
    (copy / "linearize.json").write_text(json.dumps({**record, "base_model": 5}))
    with pytest.raises(UserError, match="not a report of a conversion"):
        evaluate(copy, data=teacher.text)
    (copy / "linearize.json").unlink()
    with pytest.raises(UserError, match="names its base model"):
        evaluate(copy, data=teacher.text)


def test_bad_input_is_refused(teacher, artifact, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("a fox sat")
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    cases = [
        (dict(data=str(tmp_path / "short.txt")), "fewer than one block of 16"),
        (dict(data=str(tmp_path / "empty.txt")), "holds no text"),
        (dict(data="self"), "would measure the teacher on its own text"),
        (dict(), "needs text"),
        (dict(data=teacher.text, teacher="demo"), "another vocabulary"),
        (dict(data=teacher.text, teacher=str(artifact)), "already a linearized model"),
        (dict(data=teacher.text, context=(16, 3)), "--context 3 is too short"),
        (dict(data=teacher.text, context=(1_000_000,)), "fewer than one block of 1,000,000"),
        (dict(data=teacher.text, tasks=["arc_easy"]), "needs lm_eval"),
    ]
    before = {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file()}
    for arguments, words in cases:
        with pytest.raises(UserError, match=words) as refusal:
            evaluate(artifact, **arguments)
        assert refusal.value.hint
    assert before == {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file()}


def test_command_line(teacher, artifact, tmp_path, capsys):
    command = ["eval", str(artifact), "--data", teacher.text, "-q"]
    good = [sys.executable, "-m", "linearize_cli", *command]
    good += ["--context", "16,0.3k", "--tokens", "700", "--json", str(tmp_path / "out.json")]
    result = subprocess.run(good, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == json.loads((artifact / "eval.json").read_text())
    assert report["contexts"]["measured"] == [16, 300]
    assert f"{report['perplexity']['teacher']:.3f}" in result.stdout and "local only" in result.stdout
    with pytest.raises(SystemExit) as end:
        main([*command, "--context", "16,x"])
    assert end.value.code == 2 and "'x' should be a number of tokens" in capsys.readouterr().err


def test_lm_eval_task_of_ones_own(teacher, artifact, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")
    lines = [{"question": "a fox", "choices": ["a", "sat"], "label": i % 2} for i in range(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = tmp_path / "foxes.yaml"
    task.write_text(
        "task: foxes\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'test.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    found = evaluate(artifact, data=teacher.text, context=(16,), tasks=[str(task)], tokens=300, write=False)
    # Whatever the model prefers, it is right for half of the lines.
    assert found["tasks"]["foxes"]["acc"] == {"teacher": 0.5, "student": 0.5}
    with pytest.raises(UserError, match="no task foxes-and-hens"):
        evaluate(artifact, data=teacher.text, tasks=["foxes-and-hens"])

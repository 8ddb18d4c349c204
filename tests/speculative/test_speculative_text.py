"""`generate --speculative`: the model's own text, as it comes, and what was told of it."""

import shutil

import pytest
import torch

from linearize_cli import convert, load
from linearize_cli.conversion.heads import heads as train
from linearize_cli.errors import UserError
from linearize_cli.speculative.decode import Step, speculate
from linearize_cli.speculative.generate import generate
from linearize_cli.speculative.medusa import load_heads
from linearize_cli.speculative.trees import Choices, chain

DEMO = dict(heads=3, tokens=64 * 2 * 60, batch_size=2, seq_len=64, lr=1e-2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The embedded teacher with one layer kept softmax, and heads that have learned a little."""
    output = tmp_path_factory.mktemp("demo") / "demo"
    convert("demo", output, train=False, keep_softmax="at:1", overrides=("attention.local.size=16",))
    train(output, **DEMO)
    return output


PROMPTS = [
    "Carl came from Milan. Carl",
    "The",
    "Emma wore grey shoes. In the morning they sang a song. Emma was",
]


def test_speculative_text_is_the_greedy_text(demo):
    model, tokenizer = load(demo)
    assert model.config.linearize["softmax"] == ["model.layers.1.self_attn"]
    rows = [[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]] for prompt in PROMPTS]
    expected = []
    for row in rows:
        ids = torch.tensor([row])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=70, do_sample=False)
        expected.append(out[0, len(row) :].tolist())
    heads = load_heads(demo, model)
    for tree in (None, chain(3), Choices.of([[0], [1], [2], [0, 0], [1, 0], [0, 1], [0, 0, 3]])):
        steps = list(speculate(model, rows, heads.drafter(tree), 70, stop=[tokenizer.eos_token_id]))
        assert [sum((step.tokens[i] for step in steps), []) for i in range(3)] == expected
        assert len(steps) < 60, "drafts are accepted"


def test_generate_streams_what_it_returns(demo, capsys):
    plain = generate_text(demo)
    assert "acceptance" not in plain
    capsys.readouterr()
    for options in ({}, {"tree": "chain"}, {"speculative": "lookup"}):
        result = generate_text(demo, **({"speculative": "medusa"} | options))
        assert result["tokens"] == plain["tokens"] and result["text"] == plain["text"]
        assert capsys.readouterr().out.strip() == result["text"].strip()
        assert result["acceptance"] >= 1 and result["lossless"]
        assert result["acceptance"] == pytest.approx((48 - 1) / result["forwards"], abs=1e-3)


def generate_text(demo, **options):
    return generate(str(demo), PROMPTS[0], **{"max_new": 48, **options})


def test_sampling_depends_on_the_seed_and_typical_is_called_lossy(demo):
    options = {"speculative": "medusa", "temperature": 1.0}
    first, second = (generate_text(demo, **options, seed=seed) for seed in (1, 2))
    assert first["tokens"] != second["tokens"] and first["lossless"]
    assert generate_text(demo, **options, seed=1)["tokens"] == first["tokens"]
    assert not generate_text(demo, **options, typical=True)["lossless"]


def test_the_end_of_text_stops_it(demo, monkeypatch):
    whole = generate_text(demo)["tokens"]
    end = whole[20]
    from linearize_cli.speculative import generate as module

    def with_end(*arguments, **keywords):
        model, tokenizer = load(*arguments, **keywords)
        model.generation_config.eos_token_id = [end]
        return model, tokenizer

    monkeypatch.setattr(module, "load", with_end)
    assert generate_text(demo, speculative="medusa")["tokens"] == whole[: whole.index(end) + 1]


def test_words_and_characters_come_whole(demo, monkeypatch):
    """Tokens that end within words and within multi-byte characters."""
    from linearize_cli.speculative import generate as module

    tokenizer = load(demo)[1]
    told = " naïve café ☃☃ and straightforward snowmen."
    tokens = tokenizer(told, add_special_tokens=False)["input_ids"]
    written = []
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", **rest: written.append(text))
    monkeypatch.setattr(module, "speculate", lambda *arguments: (Step([[t]], [0], 1) for t in tokens))
    result = generate_text(demo, speculative="lookup")
    assert "".join(written).endswith(told) and result["tokens"] == tokens
    pieces = [text for text in written if text]
    assert len(pieces) > 5 and not any("�" in text for text in pieces)
    assert all(text.endswith(" ") for text in pieces[:-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative": "lookup", "tree": "chain"}, "--tree needs Medusa heads"),
        ({"tree": "chain"}, "--tree needs Medusa heads"),
        ({"typical": True}, "--typical needs speculative decoding"),
        ({"typical": True, "speculative": "medusa"}, "--typical needs sampling"),
        ({"speculative": "medusa", "tree": "absent.json"}, "absent.json"),
        ({"speculative": "medusa", "tree": "mc_sim_7b_63"}, "4 deep, but there are 3 heads"),
    ],
)
def test_options_that_do_not_go_together(options, words, demo):
    with pytest.raises(UserError, match=words):
        generate_text(demo, **options)


def test_a_folder_called_demo_is_the_artifact_that_it_holds(demo, tmp_path, monkeypatch):
    shutil.copytree(demo, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    for drafter in (None, "lookup", "medusa"):
        assert generate("demo", "The", max_new=3, speculative=drafter)["tokens"]

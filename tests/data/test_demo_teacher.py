"""The embedded teacher: it is small, loads offline, and recalls what a document told it."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize_cli.data.demo_corpus import HELDOUT_SEED, Document, Recall, generate_documents
from linearize_cli.demo import heldout_path, teacher_path
from linearize_cli.errors import UserError
from linearize_cli.metrics.recall import recall


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(teacher_path(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(teacher_path(), local_files_only=True)


@pytest.fixture(scope="module")
def documents():
    return list(generate_documents(HELDOUT_SEED, 100))


def test_teacher_is_small_and_plain(teacher):
    assert sum(file.stat().st_size for file in teacher_path().iterdir()) <= 3_000_000
    assert teacher.config.model_type == "llama"
    assert teacher.config.num_key_value_heads < teacher.config.num_attention_heads


def test_tokenizer_opens_a_document_and_loses_nothing(teacher, tokenizer, documents):
    for text in [documents[0].text, "Naïve café: 1984 zebras?\n"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == teacher.config.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.eos_token_id == teacher.generation_config.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_every_answer_is_one_token(tokenizer, documents):
    for document in documents:
        row = tokenizer(document.text)
        assert len(row["input_ids"]) <= 320
        for item in document.recalls:
            assert row.char_to_token(item.start) == row.char_to_token(item.end - 1)


def test_offsets_point_at_the_repeated_and_the_told_word(documents):
    for document in documents:
        assert len(document.recalls) >= 9
        for item in document.recalls:
            answer = document.text[item.start : item.end]
            before = [match.start() for match in re.finditer(rf"\b{answer}\b", document.text[: item.start])]
            assert before[-1] == item.previous
            assert re.match(rf"\b{answer}\b", document.text[item.start :])


def test_corpus_follows_its_seed(documents):
    assert list(generate_documents(HELDOUT_SEED, 100)) == documents
    other = {document.text for document in generate_documents(HELDOUT_SEED + 1, 1000)}
    assert len(other) == 1000 and not other & {document.text for document in documents}


def test_heldout_text_is_the_corpus(documents):
    lines = heldout_path().read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [
        document.text for document in documents[: len(lines)]
    ]
    assert len(lines) >= 60 and heldout_path().stat().st_size <= 150_000


def test_teacher_recalls_over_any_distance(teacher, tokenizer, documents):
    report = recall(teacher, tokenizer, documents)
    assert report["count"] == sum(len(document.recalls) for document in documents)
    assert report["accuracy"] >= 0.9
    far = [part for part in report["by_distance"] if part["distance"][0] >= 64]
    assert len(far) == 2 and all(part["count"] >= 100 and part["accuracy"] >= 0.9 for part in far)


def test_teacher_recalls_nothing_that_was_not_told(teacher, tokenizer, documents):
    """The repeated words cannot be guessed: with the telling cut off, recall falls to about chance."""
    untold = []
    for document in documents:
        first = {document.text[item.start : item.end]: item for item in reversed(document.recalls)}
        cut = document.text.index(". ", max(item.previous for item in first.values())) + 2
        recalls = tuple(Recall(item.start - cut, item.end - cut, 0) for item in first.values())
        untold.append(Document(document.text[cut:], recalls))
    assert recall(teacher, tokenizer, untold)["accuracy"] < 0.15


def test_recall_counts_by_distance_and_ignores_padding(teacher, tokenizer, documents):
    batched = recall(teacher, tokenizer, documents[:10], batch_size=4)
    assert batched == recall(teacher, tokenizer, documents[:10], batch_size=1)
    assert sum(part["count"] for part in batched["by_distance"]) == batched["count"]


def test_recall_is_right_by_hand(tokenizer):
    """A model that always names one word: only that word's recall is right."""
    document = next(generate_documents(3, 1))
    named = document.recalls[0]
    token = tokenizer(document.text)["input_ids"][tokenizer(document.text).char_to_token(named.start)]

    class Parrot:
        device = torch.device("cpu")

        def __call__(self, input_ids, **_):
            logits = torch.nn.functional.one_hot(torch.full_like(input_ids, token), len(tokenizer)).float()
            return type("Output", (), {"logits": logits})

    report = recall(Parrot(), tokenizer, [document])
    answers = [document.text[item.start : item.end] for item in document.recalls]
    assert report["accuracy"] == answers.count(answers[0]) / len(answers)
    assert sum(part["count"] for part in report["by_distance"]) == len(document.recalls)
    assert all((part["accuracy"] is None) == (part["count"] == 0) for part in report["by_distance"])


def test_recall_refuses_a_tokenizer_without_offsets(teacher, documents):
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="offsets"):
        recall(teacher, Slow(), documents[:1])

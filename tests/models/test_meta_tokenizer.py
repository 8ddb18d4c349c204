"""Meta's tokenizers give the ids of the programs they were made with: sentencepiece and tiktoken."""

import base64
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaConfig

from linearize_cli.errors import UserError
from linearize_cli.models.meta_llama import load_meta_tokenizer

CORPUS = "Once upon a time there was a small fox.\nIt lived in a wood, with 12 owls and 305 mice.\n" * 20
TEXTS = [
    "Once upon a time",
    " a space first",
    "   three  spaces   and\ttabs ",
    "",
    " ",
    "lines\n\nand 1234 digits.",
    "naïve ☃ 你好 🙂, unseen bytes",
]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_meta_tokenizer(folder)
    assert caught.value.hint, "says what to do next"
    return str(caught.value)


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory) -> Path:
    """A `tokenizer.model` with Llama's SentencePiece settings."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder


@pytest.mark.parametrize("saved", [False, True])
def test_sentencepiece(sentencepiece_folder, tmp_path, saved):
    """The ids of sentencepiece with BOS first, also once saved beside a Llama's config and loaded again."""
    tokenizer = load_meta_tokenizer(sentencepiece_folder)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        LlamaConfig().save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == [1, *reference.encode(text)]
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == reference.vocab_size()


def test_sentencepiece_with_other_settings(tmp_path):
    """A unigram model with NFKC splits text otherwise than Llama's BPE: refused, not approximated."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    message = refusal(tmp_path)
    assert str(tmp_path / "tokenizer.model") in message and "settings" in message


def tiktoken_encode(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's rule: join the neighbours whose union has the lowest rank, until no union has one."""
    parts = [bytes([byte]) for byte in word]
    while True:
        unions = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        pairs = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("saved", [False, True])
def test_tiktoken(tmp_path, saved):
    merges = [b"on", b"ce", b"once", b" a", b" on", b" once", b"up", b" up", b" upon", b"12", "☃".encode()]
    tokens = [bytes([byte]) for byte in range(256)] + merges
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = load_meta_tokenizer(tmp_path)
    if saved:
        tokenizer.save_pretrained(tmp_path / "saved")
        LlamaConfig().save_pretrained(tmp_path / "saved")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")

    base = len(tokens)
    assert len(tokenizer) == base + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (base, base + 1)
    # The ids that Llama 3 was trained with: https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py
    for name, offset in {"start_header_id": 6, "end_header_id": 7, "eot_id": 9}.items():
        assert tokenizer.convert_tokens_to_ids(f"<|{name}|>") == base + offset
    # Llama 3 splits before BPE: words with their leading space, up to three digits, the rest.
    words = ["once", " upon", " a", " time", ",", " ", "123", "4", " naïve", " ☃"]
    expected = [rank for word in words for rank in tiktoken_encode(ranks, word.encode())]
    assert tokenizer.encode("".join(words)) == [base, *expected]
    assert tokenizer.decode(expected) == "".join(words)


@pytest.mark.parametrize("content", [None, b"", b"no tokenizer", b"IQ== 0\nnot base64 at all\n"])
def test_bad_tokenizer_file(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / "tokenizer.model") in message and "Download" in message

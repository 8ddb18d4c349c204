"""Text sources: what they yield, in what order, and how they refuse."""

import json
from itertools import islice

import pytest
import torch
from tiny_checkpoint import WORDS, save_tokenizer, tiny_model
from transformers import AutoTokenizer

from linearize_cli.data import readers
from linearize_cli.data import sources as data
from linearize_cli.data.readers import BadRow, BadRows, Chat
from linearize_cli.data.tokenize import at_most, encode, marks_assistant
from linearize_cli.errors import UserError
from linearize_cli.models.task import MissingEmbedding
from linearize_cli.models.tasks import task_of
from linearize_cli.terminal import Terminal


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(source):
    return ["".join(document) for document in source.documents()]


def test_files_of_each_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl(tmp_path / "a.jsonl", ["a fox", "", "sat"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p q", "r"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("one document\nof two lines\n")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert read(data.open_source(str(tmp_path / "a.jsonl"))) == ["a fox", "sat"]
    source = data.open_source(str(tmp_path))
    assert read(source) == ["a fox", "sat", "p q", "r", "one document\nof two lines\n"]
    assert source.count == 5


def test_a_long_text_is_read_in_pieces_that_cut_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PART", 10)
    (tmp_path / "long.txt").write_text("a line of words\n" * 9)
    (document,) = data.open_source(str(tmp_path / "long.txt")).documents()
    pieces = list(document)
    assert len(pieces) > 3 and "".join(pieces) == "a line of words\n" * 9
    assert all(piece.endswith("\n") for piece in pieces)


def test_blocks_join_documents_each_with_its_bos(tmp_path, tokenizer):
    source = data.open_source(str(jsonl(tmp_path / "a.jsonl", ["a fox", "sat", "a a a"])))
    bos, a, fox, sat = 1, 3, 4, 5
    assert [b.tolist() for b in data.blocks(source, tokenizer, 4)] == [[bos, a, fox, bos], [sat, bos, a, a]]


def test_batches_repeat_the_source_and_resume_anywhere(tmp_path, tokenizer):
    source = data.open_source(str(jsonl(tmp_path / "a.jsonl", ["a fox sat"] * 3 + ["fox"] * 4)))
    all_at_once = list(islice(data.batches(source, tokenizer, 4, 2), 9))
    for skip in (1, 4, 8):
        resumed = next(data.batches(source, tokenizer, 4, 2, skip=skip))
        assert torch.equal(resumed.ids, all_at_once[skip].ids)


def test_sources_take_turns(tmp_path):
    a, b, c = (
        data.open_source(str(jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(n)])))
        for name, n in (("a", 4), ("b", 1), ("c", 2))
    )
    both = data.joined([a, b, c])
    assert read(both) == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"] and both.count == 7


def test_the_last_hundredth_is_held_out(tmp_path):
    source = data.open_source(str(jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(250)])))
    kept, held = data.hold_out(source)
    assert read(held) == ["text 248", "text 249"]
    assert read(kept) + read(held) == read(source)


@pytest.mark.parametrize(("length", "eval_documents"), [(1000, range(500)), (999, range(989, 999)), (2, [1])])
def test_what_is_held_out_of_a_stream(tmp_path, length, eval_documents):
    """The first 500 documents; of one so short that its end is seen, the last hundredth."""
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [f"text {i}" for i in range(length)])
    train, held = data.hold_out(data.hub_source(str(folder), BadRows()))
    assert read(held) == [f"text {i}" for i in eval_documents]
    assert set(read(train)) == {f"text {i}" for i in range(length)} - set(read(held))
    assert read(train) == read(train)  # every pass is the same


def test_the_demo_text_is_a_source():
    source = data.open_source("demo")
    assert len(list(islice(source.documents(), 3))) == 3 and source.count > 1000


def test_a_dataset_of_the_hub_is_streamed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ["x", "y"])
    source = data.hub_source(f"{folder}::train", BadRows())
    assert read(source) == ["x", "y"] and source.count is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no text"]),
        ('{"text": null}\n', ["holds no text"]),
        ('{"messages": []}\n', ["holds no text"]),
        ('{"messages": "a"}\n', ["line 1", "`role`"]),
        ('{"messages": [{"from": "gpt"}]}\n', ["line 1", "`role`"]),
        ('{"text": ""}\n', ["holds no text"]),
        ('{"text": "a"}\n{"body": "b"}\n', ["line 2", "`text`"]),
        ("not json\n", ["line 1", "JSON"]),
        ('{"text": "a"}\n{"text": "a\n', ["line 2", "JSON"]),
        ('{"text": ' + "[" * 100_000, ["line 1", "JSON"]),
        ('{"text": ' + "9" * 5000 + "}", ["line 1", "JSON"]),
        ('{"text": "a"}\n{"messages": [{"from": [], "value": "a"}, 3]}\n', ["line 2", "`role`"]),
        ('{"text": 3}\n', ["line 1", "not a string"]),
        ("[1]\n", ["line 1"]),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(content, words, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        data.open_source(str(file))
    assert all(word in str(error.value) for word in [*words, "bad.jsonl"])


CHAT = [
    {"role": "user", "content": "fox"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a fox"},
]
SHAREGPT = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in CHAT]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }} {{ eos_token }}{% endgeneration %}"
    "{% elif message.role == 'user' %}{{ message.content }}{% else %}{{ raise_exception('who?') }}{% endif %}"
    " {% endfor %}"
)
BOS, EOS, A, FOX, SAT = 1, 2, 3, 4, 5
CHAT_IDS = [BOS, FOX, SAT, EOS, A, A, FOX, EOS]
SAID = [0, 0, 1, 1, 0, 1, 1, 1]


def chats(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.open_source(str(path))


def test_chats_of_every_kind_of_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = (
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"text": "fox", "messages": CHAT},
        {"messages": []},
    )
    assert list(chats(tmp_path / "a.jsonl", *rows).documents()) == [CHAT, CHAT, ["fox"]]
    pyarrow.parquet.write_table(pyarrow.table({"id": [0], "messages": [CHAT]}), tmp_path / "b.parquet")
    assert list(data.open_source(str(tmp_path / "b.parquet")).documents()) == [CHAT]
    (tmp_path / "set").mkdir()
    chats(tmp_path / "set" / "train.jsonl", {"messages": CHAT})
    assert list(data.hub_source(str(tmp_path / "set"), BadRows()).documents()) == [CHAT]
    (tmp_path / "other").mkdir()
    jsonl(tmp_path / "other" / "a.txt", [])
    (tmp_path / "other" / "train.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match="the dataset .*the row has no `text`"):
        list(data.hub_source(str(tmp_path / "other"), BadRows()).documents())


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_a_chat_goes_through_the_template_and_has_one_bos(tokenizer, bos):
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", bos)
    (piece,) = encode(Chat(CHAT), tokenizer)
    assert piece.tolist() == [CHAT_IDS, SAID, [1, *[0] * 7]]


def test_a_template_without_marks_makes_all_count(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (piece,) = encode(Chat(CHAT), tokenizer)
    assert piece[:2].tolist() == [CHAT_IDS, [1] * 8] and not marks_assistant(tokenizer)


def test_a_chat_without_a_template_or_that_it_refuses(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        list(encode(Chat(CHAT), tokenizer))
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(UserError, match="who\\?"):
        list(encode(Chat([{"role": "narrator", "content": "a"}]), tokenizer))


def test_what_counts_and_where_documents_begin(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    source = chats(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": "a fox"}, {"messages": CHAT[:1] * 9})
    options = {"separate": True, "assistant_only": True}
    first = next(data.batches(source, tokenizer, 5, 2, **options))
    assert first.ids.tolist() == [CHAT_IDS[:5], [*CHAT_IDS[5:], BOS, A]]
    assert first.counted.tolist() == [[False, False, True, True, False], [True] * 5]
    assert first.starts.int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    plain = next(data.batches(source, tokenizer, 5, 2))
    assert torch.equal(plain.ids, first.ids) and plain.starts is None and plain.counted is None
    # The third chat's nine words have nobody answer them: the blocks of nothing else are left out.
    third = next(data.batches(source, tokenizer, 5, 2, skip=1, **options))
    assert third.ids[0].tolist() == CHAT_IDS[:5]


def test_what_is_no_data_is_refused(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "noise.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "some.csv").write_text("a,b")
    jsonl(tmp_path / "one.jsonl", ["a fox"])
    for name, words in {
        "absent.jsonl": "no such data",
        "empty": "holds no",
        "empty.txt": "holds no text",
        "cut.parquet": "cannot read",
        "noise.txt": "not UTF-8 text",
        "some.csv": "its suffix",
    }.items():
        with pytest.raises(UserError, match=words):
            data.open_source(str(tmp_path / name))
    (tmp_path / "late.txt").write_bytes(b"a fox\n" * 300_000 + b"\xff")  # found before the start, too
    with pytest.raises(UserError, match="not UTF-8 text"):
        data.open_source(str(tmp_path / "late.txt"))
    one = data.open_source(str(tmp_path / "one.jsonl"))
    assert data.hold_out(one) == (one, None)
    with pytest.raises(UserError, match="holds 0 blocks of 64 tokens"):
        data.hold_out_blocks(one, tokenizer, 64)
    with pytest.raises(UserError, match="shorter than one block of 64"):
        data.evaluation_blocks(one, tokenizer, 64)
    with pytest.raises(UserError, match="shorter than one block of 64"):
        next(data.batches(one, tokenizer, 64, 2))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in {"a.jsonl": b'{"text": "a fox"}\n', "b.txt": b"a fox"}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert read(data.open_source(str(tmp_path))) == ["a fox", "a fox"]


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    chat = [{"role": "user", "content": "fox \ud83d"}]
    jsonl(tmp_path / "a.jsonl", ["cut \ud83d", "whole \U0001f98a"])
    assert read(data.open_source(str(tmp_path / "a.jsonl"))) == ["cut \ufffd", "whole \U0001f98a"]
    (document,) = chats(tmp_path / "b.jsonl", {"messages": chat}).documents()
    assert document == [{"role": "user", "content": "fox \ufffd"}]


def bad_rows(path):
    """Five rows; the second, third and fifth cannot be used."""
    path.write_bytes(b'{"text": "a"}\n{"text": 3}\n\xff\n{"text": "fox"}\n{"text": "sat"\n')
    return str(path)


def test_bad_rows_are_left_out_only_as_many_as_is_said(tmp_path, capsys):
    name, bad = bad_rows(tmp_path / "a.jsonl"), BadRows(3)
    source = data.open_source(name, bad)
    assert read(source) == read(source) == ["a", "fox"] and source.count == 2
    bad.report(Terminal()), bad.report(Terminal())
    said = capsys.readouterr().err
    assert said.count("used: 3") == 1 and all(f"line {number}" in said for number in (2, 3, 5))
    with pytest.raises(BadRow, match="a.jsonl, line 5.*\n.*--skip-bad-rows"):
        data.open_source(name, BadRows(2))
    shared = BadRows(4)
    data.open_source(name, shared)
    with pytest.raises(BadRow, match="b.jsonl, line 3"):
        data.open_source(bad_rows(tmp_path / "b.jsonl"), shared)


def test_a_bad_row_of_a_table_or_a_stream_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [[{"role": "user"}], [{"role": None}], []]
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": rows, "text": ["", "", "a"]}), tmp_path / "a.parquet"
    )
    assert len(list(data.open_source(str(tmp_path / "a.parquet")).documents())) == 3
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match="b.parquet, row 1"):
        data.open_source(str(tmp_path / "b.parquet"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(BadRow, match="the dataset .*, row 1"):
        list(data.hub_source(str(tmp_path / "set"), BadRows()).documents())
    source = data.hub_source(str(tmp_path / "set"), BadRows(2))
    assert not list(source.documents()) and len(source.bad.skipped) == 2


def test_local_text_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="cannot read .*a.txt"):
        data.open_source(str(tmp_path))


REFUSED = [{"role": "narrator", "content": "a"}]


@pytest.fixture
def task(tokenizer):
    return task_of(tiny_model(), tokenizer)


def test_a_chat_that_the_template_refuses_is_found_before_the_start(tmp_path, tokenizer, task):
    tokenizer.chat_template = TEMPLATE
    rows = ({"messages": CHAT}, {"messages": REFUSED}, {"text": "fox"})
    with pytest.raises(BadRow, match="a.jsonl, line 2: .*who"):
        data.read_through(chats(tmp_path / "a.jsonl", *rows), tokenizer, task)
    source = data.open_source(str(tmp_path / "a.jsonl"), BadRows(1))
    data.read_through(source, tokenizer, task)
    assert len(source.bad.skipped) == 1
    assert list(data.tokens(source, tokenizer)) == [CHAT_IDS, [BOS], [FOX]]


def test_a_chat_of_a_stream_that_the_template_refuses(tmp_path, tokenizer, task):
    tokenizer.chat_template = TEMPLATE
    (tmp_path / "set").mkdir()
    chats(tmp_path / "set" / "train.jsonl", {"messages": REFUSED}, {"messages": CHAT})
    source = data.hub_source(str(tmp_path / "set"), BadRows())
    data.read_through(source, tokenizer, task)  # what is not local is not read
    with pytest.raises(BadRow, match="row 1: .*who"):
        list(data.tokens(source, tokenizer))
    assert list(data.tokens(data.hub_source(str(tmp_path / "set"), BadRows(1)), tokenizer)) == [CHAT_IDS]


def test_a_template_that_fails_in_any_way_refuses_the_chat(tokenizer):
    for template in ("{{ 1 / 0 }}", "{{ messages.a.b.c }}", "{% if %}", "{{ messages[0].content + 1 }}"):
        tokenizer.chat_template = template
        with pytest.raises(BadRow, match="the row: the model's chat template refuses"):
            list(encode(Chat(CHAT), tokenizer))


def test_a_template_that_does_not_end(tokenizer, monkeypatch):
    monkeypatch.setattr("linearize_cli.data.tokenize.RENDER_SECONDS", 0.2)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{{ j }}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop
    with pytest.raises(UserError, match="did not finish within"):
        list(encode(Chat(CHAT), tokenizer))
    with at_most(0.01, TimeoutError()):
        pass


def test_a_token_beyond_the_embeddings_is_refused_where_text_has_it(tmp_path, tokenizer):
    tokenizer.add_tokens(["new"])
    task, beyond = task_of(tiny_model(), tokenizer), len(WORDS)
    assert task.without_embedding == {beyond: "new"}
    jsonl(tmp_path / "a.jsonl", ["a fox", "a new fox"])
    source = data.open_source(str(tmp_path / "a.jsonl"))
    with pytest.raises(
        BadRow, match=rf"a.jsonl, line 2: the token {beyond} \('new'\) has no embedding.*0 to {beyond - 1}"
    ):
        data.read_through(source, tokenizer, task)
    with pytest.raises(MissingEmbedding, match="resize_token_embeddings"):
        task.batch(torch.tensor([[FOX, beyond]]))
    source = data.open_source(str(tmp_path / "a.jsonl"), BadRows(1))
    data.read_through(source, tokenizer, task)
    assert list(data.tokens(source, tokenizer)) == [[BOS], [A, FOX]]


def test_a_token_beyond_that_no_text_has_is_no_fault(tmp_path, tokenizer):
    tokenizer.add_tokens(["new"])
    task = task_of(tiny_model(), tokenizer)
    data.read_through(data.open_source(str(jsonl(tmp_path / "a.jsonl", ["a fox"]))), tokenizer, task)
    task.batch(torch.tensor([[FOX, A]]))


@pytest.mark.parametrize("words, held_out", [(100, 2), (3000, 3), (3016, 4)])
def test_the_end_of_a_single_document_is_held_out(tmp_path, tokenizer, words, held_out):
    (tmp_path / "book.txt").write_text("a fox sat sat " * (words // 4))
    book = data.open_source(str(tmp_path / "book.txt"))
    train, held = data.hold_out_blocks(book, tokenizer, 10)
    every = list(data.blocks(book, tokenizer, 10))
    found = [*data.blocks(train, tokenizer, 10), *data.evaluation_blocks(held, tokenizer, 10)]
    assert len(every) == (words + 1) // 10 and torch.equal(torch.stack(every), torch.stack(found))
    assert len(data.evaluation_blocks(held, tokenizer, 10)) == held_out
    assert held.name == f"the last {held_out} blocks of {book.name}"
    again = data.batches(train, tokenizer, 10, 1)  # an exhausted text is read again, without its held-out end
    ids = [next(again).ids[0] for _ in range(len(every))]
    assert torch.equal(ids[len(every) - held_out], every[0])

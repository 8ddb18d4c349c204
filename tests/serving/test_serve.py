"""`serve`: the answers are `generate`'s, bad requests are refused, and Ctrl-C ends it."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from types import SimpleNamespace

import openai
import pytest
import torch
from fastapi import HTTPException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from linearize_cli import convert, load
from linearize_cli.cli import main
from linearize_cli.serving.answers import CONTINUES, GONE, Answers, continuation
from linearize_cli.serving.server import PLAIN_TEMPLATE
from linearize_cli.speculative.generate import generate

NEW = 24  # tokens of each answer, some segments of the state
WORDS = ["The", "coat", "of", "Emma", "was", "black.", "Laura", "always", "ate", "corn", "and", "Walter."]
USER = {"role": "user", "content": "Emma"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "artifact"
    convert("demo", folder, train=False)
    return folder


@contextmanager
def server(artifact, *options):
    """A server in a process of its own. Yields its address and the process."""
    command = [sys.executable, "-m", "linearize_cli", "serve", str(artifact), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        found = next(match for line in lines if (match := re.search(r"at (http://\S+)/v1 ", line)))
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def interrupt(process, end=signal.SIGINT):
    """Send a signal, Ctrl-C by default, and check that the server ends as it should."""
    process.send_signal(end)
    _, rest = process.communicate(timeout=60)
    if end == signal.SIGINT:
        assert process.returncode == 0 and "stopped" in rest
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in rest and "abort" not in rest


@pytest.fixture(scope="module")
def address(artifact):
    with server(artifact) as (found, process):
        yield found
        interrupt(process)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def prompts():
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (50, 30), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row[: 1 + number % 30]) for number, row in enumerate(picks)]


def test_fifty_requests_are_answered_with_the_tokens_of_generate(artifact, client, capsys):
    model, tokenizer = load(artifact)

    def expected(prompt, chat):
        if not chat:
            new, ids = generate(str(artifact), prompt, max_new=NEW)["tokens"], tokenizer(prompt)["input_ids"]
            before, text = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids, ids + new))
            assert text.startswith(before)
            return text[len(before) :]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=PLAIN_TEMPLATE,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            row = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(row, skip_special_tokens=True)

    def answer(case):
        prompt, chat, stream = case
        if chat:
            messages = [{"role": "user", "content": prompt}]
            found = client.chat.completions.create(
                model="artifact", messages=messages, max_tokens=NEW, stream=stream
            )
            parts = (part.choices[0].delta.content for part in found) if stream else ()
            return "".join(part or "" for part in parts) if stream else found.choices[0].message.content
        found = client.completions.create(model="artifact", prompt=prompt, max_tokens=NEW, stream=stream)
        return "".join(part.choices[0].text for part in found) if stream else found.choices[0].text

    cases = [(prompt, number % 4 > 1, number % 2 > 0) for number, prompt in enumerate(prompts())]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, cases))
    for case, found in zip(cases, answers, strict=True):
        assert found == expected(*case[:2]), case
    assert len({*answers}) > 25


def words_with_spaces():
    """A tokenizer whose words hold the space before them, as SentencePiece's do. Its decoder drops the first one."""
    words = {f"▁{word}": number for number, word in enumerate(("once", "upon", "a", "time"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="▁a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_continuation_keeps_the_space_before_its_first_word():
    tokenizer = words_with_spaces()
    prompt, new = [tokenizer(text)["input_ids"] for text in ("once upon", "a time")]
    assert tokenizer.decode(new) == "a time"
    assert continuation(tokenizer, prompt, new, "a time") == " a time"


@pytest.mark.parametrize("continues", [True, False])
def test_a_streamed_continuation_too(continues, monkeypatch):
    tokenizer, parts = words_with_spaces(), []
    prompt, new = [tokenizer(text)["input_ids"] for text in ("once upon", "a time")]

    class Model:
        def generate(self, input_ids, streamer, **options):
            streamer.put(input_ids)
            for token in new:
                streamer.put(torch.tensor([token]))
            streamer.end()

    async def run():
        answers = Answers(task_of_all_tokens(), None)
        CONTINUES.set(continues)
        GONE.set(Event())
        inputs = {"input_ids": torch.tensor([prompt])}
        queue, _ = answers.generate_streaming(
            Model(), tokenizer, inputs, GenerationConfig(max_new_tokens=2), "request"
        )
        while (part := await queue.get()) is not None:
            parts.append(part)

    asyncio.run(run())
    assert "".join(parts) == (" a time" if continues else "a time")


def task_of_all_tokens():
    return SimpleNamespace(check_tokens=lambda ids: None)


def test_sampling_options_reach_the_model(client):
    def text(**options):
        return (
            client.completions.create(model="artifact", prompt="Emma", max_tokens=NEW, **options)
            .choices[0]
            .text
        )

    greedy = text()
    assert text(temperature=0) == greedy
    assert text(temperature=3, seed=1) == text(temperature=3, seed=1) != greedy
    assert text(temperature=3, seed=1) != text(temperature=3, seed=2)
    assert text(top_p=0.9, seed=1) != greedy
    stop = greedy.split()[0]
    assert text(stop=stop).split() == text(stop=[stop]).split() == [stop] != greedy.split()


def test_the_list_of_models_names_the_artifact(client, address):
    assert [model.id for model in client.models.list()] == ["artifact"]
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


CHAT, TEXT = "chat/completions", "completions"
BAD = [
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": [1, 2]}, "prompt"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    (TEXT, {"prompt": "a", "temperature": -1}, "temperature"),
    (TEXT, {"prompt": "a", "temperature": float("nan")}, "temperature"),
    (TEXT, {"prompt": "a", "top_p": 0}, "top_p"),
    (TEXT, {"prompt": "a", "seed": -1}, "seed"),
    (TEXT, {"prompt": "a", "stop": ""}, "stop"),
    (TEXT, {"prompt": "a", "n": 2}, "n: "),
    (TEXT, {"prompt": "a", "logprobs": 3}, "logprobs"),
    (TEXT, {"prompt": "a", "generation_config": "{"}, "generation_config"),
    (TEXT, {"prompt": "a", "unknown": 1}, "unknown"),
    (TEXT, {"prompt": "a", "model": "another"}, "another"),
    (TEXT, {"prompt": "\ud800"}, "surrogate"),
    (TEXT, b"{", "JSON"),
    (TEXT, b"[]", "dictionary"),
    (TEXT, b"\xff", "JSON"),
    (TEXT, b"[" * 100_000, "JSON"),
    (TEXT, {"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    (TEXT, {"prompt": ["a"]}, "prompt"),
    (CHAT, {"messages": [USER], "logit_bias": {}}, "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"5": -1e308}}, "logit_bias"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"messages": 1}}, "messages"),
    (CHAT, {"messages": [USER], "reasoning_effort": "low"}, "reasoning_effort"),
    (TEXT, b"", "JSON"),
    ("nothing", {}, "Not Found"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "text"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "",
    ),
    (CHAT, {"messages": [USER], "logit_bias": {"99999": 1.0}}, "99999"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"tokenize": False}}, "tokenize"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(("path", "body", "named"), BAD)
def test_a_bad_request_is_refused_with_its_fault_named(address, path, body, named):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/{path}", data, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert 400 <= refused.value.code < 500
    error = json.load(refused.value)["error"]
    assert named in error["message"] and "constrained" not in error["message"] and error["type"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_the_type_of_the_body_does_not_matter(address, kind):
    body = json.dumps({"prompt": "Emma", "max_tokens": 2, "temperature": 1e-40}).encode()
    request = urllib.request.Request(f"{address}/v1/{TEXT}", body, {"Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_to_a_client_that_has_gone_ends(address, client, stream):
    long = {"prompt": "Emma", "max_tokens": 10**6, "stream": stream}
    with socket.create_connection(address.removeprefix("http://").rsplit(":", 1)) as connection:
        body = json.dumps(long)
        head = f"POST /v1/{TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        time.sleep(1)
    started = time.monotonic()
    done = client.completions.create(model="artifact", prompt="Emma", max_tokens=2)
    assert done.usage.completion_tokens == 2 and time.monotonic() - started < 10


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_busy_server(artifact, end):
    """With a streamed answer and another one on their way."""
    with server(artifact) as (address, process), ThreadPoolExecutor(2) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        long = dict(model="artifact", prompt="Emma", max_tokens=10**6)
        stream = client.completions.create(**long, stream=True)
        next(iter(stream))
        waiting = [pool.submit(lambda: list(stream)), pool.submit(lambda: client.completions.create(**long))]
        time.sleep(0.5)
        interrupt(process, end)
    assert all(answer.done() for answer in waiting)


def test_prompt_and_answer_fit_the_models_positions():
    GONE.set(Event())

    class Task:
        def check_tokens(self, ids):
            pass

    answers, options = Answers(Task(), 10), GenerationConfig(max_new_tokens=1024)
    answers.prepare({"input_ids": torch.ones(1, 7, dtype=torch.long)}, options)
    assert options.max_new_tokens == 3
    for length, words in ((10, "at most 10"), (0, "empty")):
        with pytest.raises(HTTPException, match=words):
            answers.prepare({"input_ids": torch.ones(1, length, dtype=torch.long)}, options)


def test_an_address_in_use_is_refused(artifact, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(SystemExit) as exit:
            main(["serve", str(artifact), "--host", "127.0.0.1", "--port", port])
    assert exit.value.code == 2 and "in use" in capsys.readouterr().err

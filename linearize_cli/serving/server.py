"""`serve`: an artifact behind OpenAI's API, on the handlers of transformers' own server."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import X_REQUEST_ID, GenerationState

from linearize_cli.artifact.load import artifact_name, load
from linearize_cli.errors import UserError
from linearize_cli.models.positions import reach
from linearize_cli.models.tasks import CausalLM, task_of
from linearize_cli.serving.answers import CONTINUES, GONE, Answers
from linearize_cli.serving.requests import ChatRequest, Checked, CompletionRequest, checked

GRACE = 2  # seconds that running requests have to end after Ctrl-C
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class OneModel(ModelManager):
    """A manager of models that serves one model, which is loaded already.

    Args:
        name: the model's name for clients.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.force_model, self.loaded = name, (model, tokenizer)

    def process_model_name(self, model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.loaded


class State(GenerationState):
    """The state that transformers' handlers share: it gives all of them the same `Answers`."""

    def __init__(self, answers: Answers):
        super().__init__()
        self.answers = answers

    def get_manager(self, model_id: str, use_cb: bool = False) -> Answers:
        return self.answers


class Sampled:
    """A part of both handlers that turns sampling on for a request with a temperature above 0, or with a `top_p` and
    no temperature. transformers' server ignores both unless the model's generation_config.json turns sampling on.
    """

    def _build_generation_config(self, body, model_generation_config, use_cb=False):
        generation = super()._build_generation_config(body, model_generation_config, use_cb)
        if body.get("temperature", 1 if "top_p" in body else 0):
            generation.do_sample = True
        return generation


class Chat(Sampled, ChatCompletionHandler):
    """The handler of `POST /v1/chat/completions`."""


class Completions(Sampled, CompletionHandler):
    """The handler of `POST /v1/completions`. A prompt starts with the BOS token, as in training."""

    async def handle_request(self, body, request_id):
        tokenizer = self.model_manager.loaded[1]
        bos = tokenizer.bos_token_id
        if bos is not None and tokenizer(body["prompt"])["input_ids"][:1] != [bos]:
            body = {**body, "prompt": tokenizer.bos_token + body["prompt"]}
        CONTINUES.set(True)
        return await super().handle_request(body, request_id)


class Server(uvicorn.Server):
    """A server that ends its answers after their next token when Ctrl-C or SIGTERM ends it.

    Args:
        answers: computes the answers.
    """

    def __init__(self, config: uvicorn.Config, answers: Answers):
        super().__init__(config)
        self.answers = answers

    def handle_exit(self, sig, frame):
        self.answers.ended = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None):
        await super().shutdown(sockets)
        self.answers.stop()


def error_answer(status: int, message: str) -> JSONResponse:
    """Return an answer with an error, in the form that OpenAI's clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


async def watch(request: Request, gone: Event) -> None:
    """Set `gone` when the client of a request has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    gone.set()


async def answer(handler: Any, kind: type[Checked], request: Request) -> Response:
    """Return the answer of one of transformers' handlers to a request.

    Args:
        handler: the handler.
        kind: the class that checks the request.

    Raises:
        HTTPException: status 400 or 422. The request is wrong.
    """
    gone = Event()
    GONE.set(gone)
    body = checked(kind, await request.body())
    watching = asyncio.create_task(watch(request, gone))
    try:
        return await handler.handle_request(body, request.headers.get(X_REQUEST_ID, str(uuid4())))
    except (TemplateError, ValueError, RecursionError) as error:  # from the chat template, or from `generate`
        raise HTTPException(400, str(error) or type(error).__name__) from None
    finally:
        watching.cancel()


def application(models: OneModel, answers: Answers) -> FastAPI:
    """Return the server's application: chat and text completions, streamed or not, the list of models, and
    `/health`.

    Args:
        models: the model, a causal one in eval mode, and its fast tokenizer with a chat template.
        answers: computes the answers.
    """
    name, started, state = models.force_model, int(time.time()), State(answers)
    chat, completions = Chat(models, state), Completions(models, state)
    app = FastAPI(title=f"linearize serve {name}", docs_url=None, redoc_url=None, openapi_url=None)
    entry = {"id": name, "object": "model", "created": started, "owned_by": "linearize"}

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException):
        return error_answer(error.status_code, error.detail)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return error_answer(500, f"{type(error).__name__}: {error}")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await answer(chat, ChatRequest, request)

    @app.post("/v1/completions")
    async def text_completions(request: Request):
        return await answer(completions, CompletionRequest, request)

    @app.get("/v1/models")
    def list_models():
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    def describe_model(model: str):
        if model != name:
            raise HTTPException(404, f"there is no model {model!r}, only {name!r}")
        return entry

    @app.get("/health")
    def health():
        return {"status": "ok"}

    return app


def serve(
    artifact: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
    quiet: bool = False,
    say: Callable[[str], None] = print,
    note: Callable[[str], None] = print,
) -> None:
    """Serve an artifact behind OpenAI's API until Ctrl-C.

    Args:
        artifact: the artifact's folder or Hub id. The folder's name, or the id, is the model's name for clients.
        host, port: the address to listen on. Port 0 takes a free one.
        device: the torch device to run on. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: torch's name of the dtype to run in. None uses the artifact's.
        trust_remote_code: allow the artifact to run its own code.
        checksums: False to load files that differ from the artifact's checksums.
        quiet: True to log no requests.
        say: shows the address.
        note: shows a line about the progress.

    Raises:
        UserError: the address is not free, the artifact cannot be loaded, or it is no causal language model with
            a fast tokenizer.
    """
    listener = listen(host, port)
    with listener:
        model, tokenizer = load(
            artifact, device=device, dtype=dtype, trust_remote_code=trust_remote_code, checksums=checksums
        )
        task = task_of(model, tokenizer)
        if not isinstance(task, CausalLM):
            raise UserError(
                f"{artifact} is a {task.kind}; only causal language models can be served",
                f"Use it through transformers' {task.auto_class}.",
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"{artifact}: streaming needs a fast tokenizer; {type(tokenizer).__name__} is not one",
                "Save a fast tokenizer (tokenizer.json) in the folder.",
            )
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
            note("no chat template: messages are written as `role: content`, one a line")
        name = Path(artifact_name(artifact)).name if Path(artifact).is_dir() else artifact
        bound = listener.getsockname()[1]
        answers = Answers(task, reach(model))
        config = uvicorn.Config(
            application(OneModel(name, model, tokenizer), answers),
            log_level="warning" if quiet else "info",
            timeout_graceful_shutdown=GRACE,
        )
        logging.getLogger("uvicorn.error").addFilter(unless_cancelled)
        shown = f"[{host}]" if ":" in host else host
        try:
            say(f"serving {name} at http://{shown}:{bound}/v1 (Ctrl-C to stop)")
            Server(config, answers).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again when all requests have ended
            pass
        note("stopped")


def unless_cancelled(record: logging.LogRecord) -> bool:
    """Return False for the traceback of a request that Ctrl-C has cancelled."""
    return not record.exc_info or not isinstance(record.exc_info[1], CancelledError)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        UserError: the address is unknown or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            "Choose another --port (0 takes a free one) or --host.",
        ) from None
    return listener

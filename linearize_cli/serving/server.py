"""`serve`: an artifact behind OpenAI's API, on the handlers of transformers' own server."""

from __future__ import annotations

import logging
import socket
import time
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import X_REQUEST_ID, GenerateManager, GenerationState

from linearize_cli.artifact.load import artifact_name, load
from linearize_cli.errors import UserError
from linearize_cli.models.positions import reach
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM, task_of
from linearize_cli.serving.requests import ChatRequest, CompletionRequest, checked

GRACE = 2  # seconds that running requests have to end after Ctrl-C
NO_BODY = Body(None)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class OneModel(ModelManager):
    """The models of the server: one, which is loaded already.

    Args:
        name: the name that clients ask for.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.force_model, self.loaded = name, (model, tokenizer)

    def process_model_name(self, model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.loaded


class Generations(GenerateManager):
    """The generation of answers, one after the other. It refuses prompts that the model cannot read.

    Args:
        task: the model's task.
        limit: the most tokens of a prompt and its answer, or None if the model has no limit.
    """

    def __init__(self, task: Task, limit: int | None):
        super().__init__()
        self.task, self.limit, self.ended = task, limit, False

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.fit(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.fit(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    def stop(self) -> None:
        """End the running answer after its next token, and wait for that. The interpreter must not end while torch
        computes in a thread.
        """
        self.ended = True
        self.submit(lambda: None).result()

    def fit(self, inputs: dict[str, Any], generation: GenerationConfig) -> None:
        """Reduce the number of new tokens to what the model can read after the prompt. Let `stop` end the answer.

        Args:
            inputs: the arguments of the model's `generate`, which get a stopping criterion.
            generation: its config, which gets the number of new tokens.

        Raises:
            HTTPException: status 400. The prompt is empty or too long, or has a token without an embedding.
        """
        ids = inputs["input_ids"]
        length = ids.shape[-1]
        if not length:
            raise HTTPException(400, "the prompt is empty, and this tokenizer has no BOS token to start from")
        try:
            self.task.check_tokens(ids)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        if self.limit is not None:
            if length >= self.limit:
                raise HTTPException(
                    400, f"the prompt has {length} tokens; prompt and answer have at most {self.limit}"
                )
            generation.max_new_tokens = min(generation.max_new_tokens, self.limit - length)
        inputs["stopping_criteria"] = StoppingCriteriaList([self.stopped])

    def stopped(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return True for each row if the server ends, the criterion of `generate` (`ids` `[B, T]`)."""
        return torch.full(ids.shape[:1], self.ended, device=ids.device)


class Generator(GenerationState):
    """The state of the server's generation, which uses one `Generations` for all requests."""

    def __init__(self, generations: Generations):
        super().__init__()
        self.generations = generations

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generations:
        return self.generations


def sampled(body: dict[str, Any], generation: GenerationConfig) -> GenerationConfig:
    """Let the answer be sampled if the request has a temperature above 0, or only a `top_p`. transformers' server
    ignores both unless the model's generation_config.json turns sampling on.
    """
    if body.get("temperature", 1 if "top_p" in body else 0):
        generation.do_sample = True
    return generation


class Chat(ChatCompletionHandler):
    """The handler of `POST /v1/chat/completions`."""

    def _build_generation_config(self, body, model_generation_config, use_cb=False):
        return sampled(body, super()._build_generation_config(body, model_generation_config, use_cb))


class Completions(CompletionHandler):
    """The handler of `POST /v1/completions`. A prompt starts with the BOS token, as in training."""

    async def handle_request(self, body, request_id):
        tokenizer = self.model_manager.loaded[1]
        bos = tokenizer.bos_token_id
        if bos is not None and tokenizer(body["prompt"])["input_ids"][:1] != [bos]:
            body = {**body, "prompt": tokenizer.bos_token + body["prompt"]}
        return await super().handle_request(body, request_id)

    def _build_generation_config(self, body, model_generation_config, use_cb=False):
        return sampled(body, super()._build_generation_config(body, model_generation_config, use_cb))


async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
    """Return the answer to a bad request, in the form that OpenAI's clients show."""
    body = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": body}, error.status_code)


def application(models: OneModel, generations: Generations) -> FastAPI:
    """Return the server's application: chat and text completions, streamed or not, the list of models, and
    `/health`.

    Args:
        models: the model, a causal one in eval mode, and its fast tokenizer with a chat template.
        generations: the generation of the answers.
    """
    name, started, state = models.force_model, int(time.time()), Generator(generations)
    chat, completions = Chat(models, state), Completions(models, state)
    app = FastAPI(title=f"linearize serve {name}")
    app.exception_handler(StarletteHTTPException)(refused)

    async def answer(handler, kind, body: Any, request: Request):
        try:
            return await handler.handle_request(
                checked(kind, body), request.headers.get(X_REQUEST_ID, str(uuid4()))
            )
        except (
            TemplateError,
            ValueError,
        ) as error:  # the template refuses the messages, or generate an option
            raise HTTPException(400, str(error)) from None

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: Any = NO_BODY):
        return await answer(chat, ChatRequest, body, request)

    @app.post("/v1/completions")
    async def text_completions(request: Request, body: Any = NO_BODY):
        return await answer(completions, CompletionRequest, body, request)

    @app.get("/v1/models")
    def list_models():
        entry = {"id": name, "object": "model", "created": started, "owned_by": "linearize"}
        return {"object": "list", "data": [entry]}

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
        note: shows a line of text.

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
        generations = Generations(task, reach(model))
        config = uvicorn.Config(
            application(OneModel(name, model, tokenizer), generations),
            log_level="warning" if quiet else "info",
            timeout_graceful_shutdown=GRACE,
        )
        logging.getLogger("uvicorn.error").addFilter(unless_cancelled)
        try:
            note(f"serving {name} at http://{host}:{bound}/v1 (Ctrl-C to stop)")
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again when all requests have ended
            generations.stop()
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

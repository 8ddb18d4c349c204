"""The requests that the server takes, a part of OpenAI's API, and their checks."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from linearize_cli.inputs import without_surrogates

Text = Annotated[str, Field(min_length=1)]


def without_own_arguments(names: dict[str, Any]) -> dict[str, Any]:
    """Check that the variables of a chat template are none of the arguments that the server itself passes.

    Raises:
        ValueError: one of them is.
    """
    if own := names.keys() & inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys():
        raise ValueError(f"{', '.join(sorted(own))} cannot be set")
    return names


class Request(BaseModel):
    """The fields that chat and text completions share.

    Fields which transformers' server would accept and ignore, and which change the answer, must have the value that
    it assumes. Other unknown fields are passed on, and refused there.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    presence_penalty: Literal[0] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    n: Literal[1] | None = None
    generation_config: None = None


class Part(BaseModel):
    """A part of a message. Only text is accepted."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: str


class Function(BaseModel):
    """The function of a tool call in an earlier message."""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: str | dict[str, Any]


class ToolCall(BaseModel):
    """A tool call in an earlier message."""

    model_config = ConfigDict(extra="allow")

    function: Function


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None


class TextFormat(BaseModel):
    """The format of an answer. Only free text is accepted."""

    type: Literal["text"]


class ChatRequest(Request):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(without_own_arguments)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], float] | None = None
    logprobs: Literal[False] | None = None


class CompletionRequest(Request):
    """The body of `POST /v1/completions`."""

    prompt: str
    suffix: str | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


def checked(kind: type[Request], body: Any) -> dict[str, Any]:
    """Return the fields of a request that are set, with the types that the server expects.

    Args:
        kind: the class of the request.
        body: the request's JSON.

    Raises:
        HTTPException: status 422. Its detail names each wrong field.
    """
    text = json.dumps(body, ensure_ascii=False)
    if text != without_surrogates(text):
        raise HTTPException(422, "a string has half of a surrogate pair, which is no Unicode text")
    try:
        return kind.model_validate(body).model_dump(exclude_none=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in error.errors()]
        raise HTTPException(422, "; ".join(faults[:5])) from None

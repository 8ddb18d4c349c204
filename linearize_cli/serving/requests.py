"""The requests that the server takes, a part of OpenAI's API, and their checks."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from linearize_cli.inputs import without_surrogates


def unicode_text(text: str) -> str:
    """Check that a text has no half of a surrogate pair.

    Raises:
        ValueError: it has one.
    """
    if text != without_surrogates(text):
        raise ValueError("half of a surrogate pair is no Unicode text")
    return text


Unicode = Annotated[str, AfterValidator(unicode_text)]
Text = Annotated[Unicode, Field(min_length=1)]
Token = Annotated[str, Field(pattern=r"^\d+$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def greedy_if_tiny(temperature: float) -> float:
    """Return 0 for a temperature so small that logits divided by it would overflow."""
    return temperature if temperature > 1e-5 else 0.0


def only_variables(names: dict[str, Any]) -> dict[str, Any]:
    """Check the variables that a request sets in the chat template.

    Raises:
        ValueError: one of them has the name of an argument that the server passes to the template or its caller.
    """
    taken = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    if both := names.keys() & taken:
        raise ValueError(f"{', '.join(sorted(both))} cannot be set")
    return names


class Checked(BaseModel):
    """The fields of a request for a chat or a text completion.

    A field that would change the answer in OpenAI's API and that transformers' server ignores may only have its
    default value. transformers' server itself refuses the fields that it does not know.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(greedy_if_tiny)] | None = None
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
    text: Unicode


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
    content: Unicode | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None


class TextFormat(BaseModel):
    """The format of an answer. Only free text is accepted."""

    type: Literal["text"]


class ChatRequest(Checked):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(only_variables)] | None = None
    logit_bias: Annotated[dict[Token, Bias], Field(min_length=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    reasoning_effort: None = None


class CompletionRequest(Checked):
    """The body of `POST /v1/completions`."""

    prompt: Unicode
    suffix: None = None
    logit_bias: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


def checked(kind: type[Checked], body: bytes) -> dict[str, Any]:
    """Return the fields of a request that are set, with the types that the server expects.

    Args:
        kind: the class of the request.
        body: the request's body, which should be a JSON object.

    Raises:
        HTTPException: status 422. Its message names each wrong field.
    """
    try:
        return kind.model_validate(json.loads(body)).model_dump(exclude_none=True)
    except ValidationError as error:
        faults = [f"{where(fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise HTTPException(422, "; ".join(dict.fromkeys(faults[:5]))) from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the body is not valid JSON: {error}") from None


def where(location: tuple[int | str, ...]) -> str:
    """Return the path of a wrong field, without pydantic's names of the types that it has tried."""
    names = [str(part) for part in location if str(part).replace("_", "").isalnum()]
    return ".".join(names) or "body"

"""The answers of `serve`: prompts are checked, and continued by the model one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from threading import Event
from typing import Any

import torch
from fastapi import HTTPException
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

from linearize_cli.errors import UserError
from linearize_cli.models.task import Task

# Set when the client of the request at hand has gone.
GONE: ContextVar[Event] = ContextVar("gone")
# True while the request at hand continues a text, whose last word and the first new one are then apart as they should.
CONTINUES: ContextVar[bool] = ContextVar("continues", default=False)


class Answers(GenerateManager):
    """Computes the answers, one after the other. It refuses prompts that the model cannot read.

    Args:
        task: the model's task.
        limit: the most tokens of a prompt and its answer, or None if the model has no limit.

    Attributes:
        ended: True if the server ends. Every answer then ends after its next token.
    """

    def __init__(self, task: Task, limit: int | None):
        super().__init__()
        self.task, self.limit, self.ended = task, limit, False

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.prepare(inputs, gen_config)
        runs: list[Callable] = []
        self.submit = runs.append  # the run has to wait until its streamer is complete
        try:
            queue, streamer = super().generate_streaming(
                model, processor, inputs, gen_config, *args, **kwargs
            )
        finally:
            del self.submit
        if CONTINUES.get():
            streamer._decode_stream = DecodeStream(inputs["input_ids"][0].tolist(), skip_special_tokens=True)
        self.submit(*runs)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        self.prepare(inputs, gen_config)
        text, length, ids = await super().generate_non_streaming(
            model, processor, inputs, gen_config, *args, **kwargs
        )
        if self.ended:
            raise HTTPException(503, "the server was stopped before the answer was complete")
        if CONTINUES.get():
            text = continuation(processor, inputs["input_ids"][0].tolist(), ids.tolist(), text)
        return text, length, ids

    def prepare(self, inputs: dict[str, Any], generation: GenerationConfig) -> None:
        """Check a prompt, and complete the arguments of the model's `generate`.

        Args:
            inputs: the arguments. They get a criterion that ends the answer if its client has gone or the server ends.
            generation: the config. Its number of new tokens is reduced to what the model can read after the prompt.

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
        gone = GONE.get()

        def stopped(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full(ids.shape[:1], self.ended or gone.is_set(), device=ids.device)

        inputs["stopping_criteria"] = StoppingCriteriaList([stopped])

    def stop(self) -> None:
        """Wait until the thread of the answers is idle or dead. If torch still computed in it, the interpreter would
        abort at its end.
        """
        self.ended = True
        idle, thread = self.submit(lambda: None), self._thread._thread
        while thread.is_alive() and not idle.done():
            time.sleep(0.02)


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int], alone: str) -> str:
    """Return the text of new tokens after a prompt. Decoded alone, a first word may lose the space before it.

    Args:
        prompt, new: tokens.
        alone: the text of the new tokens alone, for a tokenizer that decodes a prompt differently if more follows.
    """
    before, all_of_it = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
    return all_of_it[len(before) :] if all_of_it.startswith(before) else alone

"""`generate`: continue a prompt, printing text as it comes."""

import time
from typing import Any

import torch
from transformers import TextStreamer

from linearize_cli.artifact.load import load
from linearize_cli.errors import UserError
from linearize_cli.tasks import task_of


def generate(
    artifact: str,
    prompt: str,
    *,
    max_new: int = 128,
    speculative: str | None = None,
    temperature: float = 0.0,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue a prompt with an artifact and stream it to standard output; an encoder-decoder answers it.

    Args:
        speculative: "lookup" drafts with n-grams of the text so far (transformers' prompt lookup).
        temperature: 0 is greedy.

    Raises:
        UserError: no such artifact, one that writes no text, an empty prompt, an unfit temperature, or a drafter
            that is not there.
    """
    if not 0 <= temperature <= 100:
        raise UserError(
            f"--temperature {temperature} is not between 0 and 100", "0 is greedy, 1 is the model's own."
        )
    if speculative == "medusa":
        raise UserError(f"{artifact} has no Medusa heads", "Use --speculative lookup, or none.")
    model, tokenizer = load(artifact, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    task = task_of(model, tokenizer)
    if not task.decodes:
        raise UserError(
            f"{artifact} is an encoder ({task.kind}): it reads text and writes none",
            f"Use it through transformers' {task.auto_class}.",
        )
    ids = torch.tensor([task.prompt(tokenizer, prompt)], dtype=torch.long)
    if not ids.numel():
        raise UserError(
            "the prompt is empty, and this tokenizer has no token to begin a text with", "Give a PROMPT."
        )
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    lookup = {"prompt_lookup_num_tokens": 8} if speculative == "lookup" else {}
    ids = ids.to(model.device)
    started = time.monotonic()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
        **lookup,
    )[0]
    new = output[task.given(ids) :].tolist()
    return {
        "artifact": artifact,
        "prompt": prompt,
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "tokens": new,
        "tokens_per_s": round(len(new) / (time.monotonic() - started), 1),
        "seed": seed,
    }

"""`generate`: the continuation of a prompt, streamed to standard output."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from linearize_cli.artifact.load import artifact_name, load
from linearize_cli.errors import UserError
from linearize_cli.models.find import resolve_model
from linearize_cli.models.positions import last_position
from linearize_cli.models.tasks import task_of
from linearize_cli.speculative.accept import Greedy, Rule, Sampling, Typical
from linearize_cli.speculative.decode import speculate
from linearize_cli.speculative.drafts import Drafter, Lookup
from linearize_cli.speculative.medusa import check_heads, load_heads
from linearize_cli.speculative.trees import AUTO, named_tree

LOOKUP, MEDUSA = "lookup", "medusa"


def generate(
    artifact: str,
    prompt: str,
    *,
    max_new: int = 128,
    speculative: str | None = None,
    tree: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    typical: bool = False,
    trust_remote_code: bool = False,
    checksums: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue a prompt with an artifact and stream the text to standard output. An encoder-decoder answers
    it.

    Args:
        artifact: the artifact's folder or Hub id.
        prompt: the text to continue.
        max_new: the most tokens to generate.
        speculative: "medusa" drafts token trees with the artifact's heads, "lookup" drafts from the text so
            far. None decodes without drafts.
        tree: the tree for "medusa": `auto` (the heads' own), `chain`, `mc_sim_7b_63`, or a JSON file of
            choices.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of most probable tokens whose probabilities sum to this. 1 keeps
            all tokens.
        typical: with `speculative`, use typical acceptance. It accepts more drafts, but the text no longer
            follows the model's distribution.
        trust_remote_code: allow the artifact to run its own code. If False, an artifact that needs it is
            refused.
        checksums: False to load files that differ from the artifact's checksums.
        device: the torch device to run on. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: torch's name of the dtype to run in. None uses the artifact's.
        seed: the seed of sampling.

    Returns:
        A dict for JSON: `artifact`, `prompt`, `text` (prompt and continuation), `tokens` (the new token ids),
        `tokens_per_s` and `seed`. With `speculative` also `acceptance`, `forwards` and `lossless` (see
        `speculative_text`).

    Raises:
        UserError: the artifact cannot be loaded or is an encoder, the prompt is empty, options are out of
            range or do not go together, the heads or the tree are missing, or the model cannot verify drafts.
    """
    check_options(speculative, tree, temperature, top_p, typical)
    model, tokenizer = load(
        artifact, device=device, dtype=dtype, trust_remote_code=trust_remote_code, checksums=checksums
    )
    task = task_of(model, tokenizer)
    if not task.decodes:
        raise UserError(
            f"{artifact} is an encoder ({task.kind}), which cannot generate text",
            f"Use it through transformers' {task.auto_class}.",
        )
    ids = torch.tensor([task.prompt(tokenizer, prompt)], dtype=torch.long)
    if not ids.numel():
        raise UserError(
            "the prompt is empty, and this tokenizer has no BOS token to start from", "Pass a PROMPT."
        )
    task.check_tokens(ids)
    ids, streamer = ids.to(model.device), TextStreamer(tokenizer, skip_special_tokens=True)
    if speculative:
        check_heads(model, type(task))
        drafter = drafter_of(speculative, tree, artifact, model)
        rule, run = rule_of(temperature, top_p, typical, seed), speculative_text
        options = (drafter, rule)
    else:
        torch.manual_seed(seed)
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        run, options = plain_text, (temperature, top_p, next((x for x in ends if x is not None), None))
    started = time.monotonic()
    output, facts = run(model, ids, max_new, streamer, *options)
    seconds = time.monotonic() - started
    new = output[task.given(ids) :]
    return {
        "artifact": artifact,
        "prompt": prompt,
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "tokens": new,
        "tokens_per_s": round(len(new) / seconds, 1),
        **facts,
        "seed": seed,
    }


def check_options(
    speculative: str | None, tree: str | None, temperature: float, top_p: float, typical: bool
) -> None:
    """Check that the options of `generate` are in range and can be combined.

    Raises:
        UserError: an option is out of range, or needs another option that is missing.
    """
    if not 0 <= temperature <= 100:
        raise UserError(
            f"--temperature {temperature} is not between 0 and 100",
            "Use 0 for greedy decoding, 1 for the model's own distribution.",
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p} is not above 0 and at most 1", "Use 1 to keep all tokens.")
    if top_p < 1 and (typical or not temperature):
        raise UserError(
            "--top-p needs sampling without --typical",
            "Add --temperature T, such as 0.7, or leave --top-p out.",
        )
    if tree and speculative != MEDUSA:
        raise UserError("--tree needs Medusa heads", "Add --speculative medusa.")
    if typical and not speculative:
        raise UserError("--typical needs speculative decoding", "Add --speculative medusa or lookup.")
    if typical and not temperature:
        raise UserError("--typical needs sampling", "Add --temperature T, such as 0.7.")


def plain_text(
    model: PreTrainedModel,
    ids: Tensor,
    max_new: int,
    streamer: TextStreamer,
    temperature: float,
    top_p: float,
    pad: int | None,
) -> tuple[list[int], dict[str, Any]]:
    """Continue a prompt with transformers' `generate`.

    Args:
        ids: `[1, T]`, the prompt's tokens.
        max_new: the most tokens to generate.
        streamer: prints the text while it is generated.
        temperature, top_p: as in `generate`. A temperature of 0 is greedy.
        pad: the pad token's id, or None.

    Returns:
        All tokens, and an empty dict, in the form of `speculative_text`.
    """
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new,
        pad_token_id=pad,
        streamer=streamer,
        **sampling,
    )
    return output[0].tolist(), {}


def speculative_text(
    model: PreTrainedModel,
    ids: Tensor,
    max_new: int,
    streamer: TextStreamer,
    drafter: Drafter,
    rule: Rule,
) -> tuple[list[int], dict[str, Any]]:
    """Continue a prompt with speculative decoding.

    Args:
        ids: `[1, T]`, the prompt's tokens.
        max_new: the most tokens to generate.
        streamer: prints the text while it is generated.
        drafter: proposes the token trees.
        rule: decides which proposed tokens are accepted.

    Returns:
        All tokens, and a dict. `forwards` is the number of the model's forwards, without the prompt's own,
        which gives the first token. `acceptance` is the mean number of new tokens per forward, or None
        without forwards. `lossless` is True if the text follows the model's own distribution.
    """
    row, counts = ids[0].tolist(), []
    streamer.put(ids.cpu())
    ends = model.generation_config.eos_token_id
    stop = [] if ends is None else [ends] if isinstance(ends, int) else ends
    for step in speculate(model, [row], drafter, max_new, rule, stop, last_position(model)):
        (new,) = step.tokens
        row = row + new
        counts.append(len(new))
        streamer.put(torch.tensor(new))
    streamer.end()
    trees = counts[1:]
    return row, {
        "acceptance": round(sum(trees) / len(trees), 3) if trees else None,
        "forwards": len(counts) - 1,
        "lossless": rule.lossless,
    }


def drafter_of(name: str, tree: str | None, artifact: str, model: PreTrainedModel) -> Drafter:
    """Return the drafter with the name "lookup" or "medusa".

    Args:
        tree: the tree for "medusa", as in `generate`. None uses the heads' own.
        artifact: the artifact's folder or Hub id, which has the heads.

    Raises:
        UserError: the artifact has no heads, or the tree does not fit them.
    """
    if name == LOOKUP:
        return Lookup()
    heads = load_heads(resolve_model(artifact_name(artifact)), model)
    return heads.drafter(named_tree(tree or AUTO, len(heads), heads.output.shape[1], heads.tree))


def rule_of(temperature: float, top_p: float, typical: bool, seed: int) -> Rule:
    """Return the acceptance rule: greedy at temperature 0, else typical acceptance if `typical`, else
    sampling.
    """
    if not temperature:
        return Greedy()
    return (Typical if typical else Sampling)(temperature, torch.Generator().manual_seed(seed), top_p)

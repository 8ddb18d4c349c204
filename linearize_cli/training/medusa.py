"""Training Medusa heads: the model is frozen, and each head learns which token follows so many places later."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linearize_cli.methods.recipe import HeadStage, head_rate
from linearize_cli.models.batch import IGNORED, Batch
from linearize_cli.speculative.medusa import MedusaHeads, last_hidden
from linearize_cli.speculative.tune import tune
from linearize_cli.training.checkpoint import Session
from linearize_cli.training.distillation import LOGITS, mean_count
from linearize_cli.training.job import Job
from linearize_cli.training.loop import StagePlan, train
from linearize_cli.training.objective import Objective
from linearize_cli.training.text import TextBlocks

STAGE = "heads"
LOG = "medusa.jsonl"  # beside the heads


class HeadTraining(Objective):
    """The objective: a batch -> `Σ_k decay^k · cross entropy of head k`, and each head's own as a record.

    A head's right answer is the model's own best token at that place of the text: what greedy decoding would
    verify it against.

    Where a batch has more than `limit` logits, they are made a few tokens at a time, and once more in the backward.
    """

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads, decay: float, limit: int = LOGITS):
        super().__init__()
        self.model, self.heads, self.decay, self.limit = model.requires_grad_(False), heads, decay, limit

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        hidden = last_hidden(self.model, batch.inputs)
        size = max(1, self.limit // self.heads.output[..., 0].numel())
        answers = self.answers(hidden, batch.labels, size).flatten(1)  # [K, B T]
        rows = hidden.flatten(0, 1).to(self.heads.weight.dtype)
        known = (answers != IGNORED).any(0)
        rows, answers = rows[known], answers[:, known]
        counts = torch.stack([mean_count(own != IGNORED) for own in answers])
        pieces = list(zip(rows.split(size), answers.split(size, 1), strict=True))
        part = self.part
        if len(pieces) > 1:
            part = partial(checkpoint, self.part, use_reentrant=False, preserve_rng_state=False)
        losses = sum(part(*piece) for piece in pieces) / counts
        weights = self.decay ** torch.arange(1, len(losses) + 1, device=losses.device)
        return (weights * losses).sum(), {"heads": {str(k): loss for k, loss in enumerate(losses, 1)}}

    def part(self, rows: Tensor, answers: Tensor) -> Tensor:
        """What some tokens `[n, width]` add to each head's loss; answers `[K, n]`."""
        logits = self.heads(rows)
        terms = cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORED, reduction="none")
        return terms.view(answers.shape).sum(-1)

    @torch.no_grad()
    def answers(self, hidden: Tensor, labels: Tensor, size: int) -> Tensor:
        """`[K, B, T]`: each head's at every token; IGNORED where its document ends before, or does not count.

        Args:
            hidden: `[B, T, width]`; labels: `[B, T]`, the text's next token or IGNORED.
            size: tokens whose logits may be held at once.
        """
        head = self.model.get_output_embeddings()
        own = torch.cat([head(rows).argmax(-1) for rows in hidden.flatten(0, 1).split(size)])
        own = own.view(labels.shape).masked_fill(labels == IGNORED, IGNORED)
        found, inside = [], labels != IGNORED
        for k in range(1, len(self.heads) + 1):
            later = pad(own[:, k:], (0, k), value=IGNORED)
            inside = inside & (later != IGNORED)
            found.append(later.masked_fill(~inside, IGNORED))
        return torch.stack(found)


def train_heads(
    job: Job, model: PreTrainedModel, blocks: TextBlocks, session: Session, start: int = 0
) -> tuple[MedusaHeads, dict[str, Any]]:
    """Train new heads for a frozen model, and measure what they are worth on the held-out blocks.

    Args:
        session: its folder keeps the checkpoint and the log. An interrupted run is resumed from there.
        start: batches of the training text to leave out.

    Returns:
        The heads and the facts about them that `linearize.json` records.
    """
    started = time.monotonic()
    options = HeadStage(lr=job.medusa_lr)
    options = replace(options, lr=head_rate(options, model.get_output_embeddings().weight.shape[1]))
    steps = job.recipe.recover.tokens // blocks.tokens_per_step
    plan = StagePlan(STAGE, steps, blocks.tokens_per_step, options)
    objective = HeadTraining(model, MedusaHeads.of(model, job.medusa_heads), options.decay)
    train(plan, objective, blocks.batches(session.engine, start), session)
    heads = objective.heads.requires_grad_(False).eval()
    if session.engine.main:
        session.terminal.note("measuring the heads on held-out text, and the cost of a step")
        tune(model, heads, blocks.held_out)
    expected = round(heads.tree.expected(heads.acceptance), 3) if heads.acceptance else None
    facts = {
        "heads": len(heads),
        "tokens": steps * blocks.tokens_per_step,
        "acceptance": [[round(rate, 4) for rate in rates] for rates in heads.acceptance],
        "tree_nodes": len(heads.tree.parents),
        "expected_tokens_per_step": expected,
        "seconds": round(time.monotonic() - started, 1),
    }
    return heads, facts

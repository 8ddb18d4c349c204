"""Training of Medusa heads on a frozen model. Head k predicts the token k positions after the next one."""

import time
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
LOG = "medusa.jsonl"  # in the folder of the heads


class HeadTraining(Objective):
    """The training objective of Medusa heads: `Σ_k decay^k · cross entropy of head k`. Each head's loss is
    also recorded alone.

    The target of a head is the model's own most probable token at that position of the text, because greedy
    decoding verifies drafts against it. A batch with more than `limit` logits is processed a few tokens at a
    time, and the backward computes their logits again.

    Args:
        model: the model, which is frozen.
        heads: the heads to train.
        decay: the factor between the weights of a head and of the one before it.
        limit: the largest number of logits in memory.
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
        chunks = list(zip(rows.split(size), answers.split(size, 1), strict=True))
        part = self.part
        if len(chunks) > 1:
            part = partial(checkpoint, self.part, use_reentrant=False, preserve_rng_state=False)
        losses = sum(part(*chunk) for chunk in chunks) / counts
        weights = self.decay ** torch.arange(1, len(losses) + 1, device=losses.device)
        return (weights * losses).sum(), {"heads": {str(k): loss for k, loss in enumerate(losses, 1)}}

    def part(self, rows: Tensor, answers: Tensor) -> Tensor:
        """Return each head's loss `[K]`, summed over n of a batch's tokens.

        Args:
            rows: last hidden states `[n, width]`.
            answers: targets `[K, n]` int64, IGNORED where a head has none.
        """
        logits = self.heads(rows)
        terms = cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORED, reduction="none")
        return terms.view(answers.shape).sum(-1)

    @torch.no_grad()
    def answers(self, hidden: Tensor, labels: Tensor, size: int) -> Tensor:
        """Return the target token of each of the K heads at each position, `[K, B, T]`.

        It is IGNORED where the document ends before the target, and at tokens that are not trained on.

        Args:
            hidden: last hidden states `[B, T, width]`.
            labels: `[B, T]`, the next token of the text, or IGNORED at tokens that are not trained on.
            size: the number of tokens whose logits may be in memory at once.
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
    """Train new heads for a frozen model, and measure their acceptance on the held-out blocks.

    Args:
        job: the run configuration, with the number of heads and their learning rate.
        blocks: the training text and the held-out text in blocks.
        session: its folder keeps the checkpoint and the log. An interrupted run is resumed from there.
        start: the number of batches of training text to skip.

    Returns:
        the heads, and the facts about them for `linearize.json`.
    """
    started = time.monotonic()
    options = HeadStage(lr=job.medusa_lr)
    lr = head_rate(options, model.get_output_embeddings().weight.shape[1])
    options = options.model_copy(update={"lr": lr})
    steps = job.recipe.recover.tokens // blocks.tokens_per_step
    plan = StagePlan(STAGE, steps, blocks.tokens_per_step, options)
    objective = HeadTraining(model, MedusaHeads.of(model, job.medusa_heads), options.decay)
    train(plan, objective, blocks.batches(session.engine, start), session)
    heads = objective.heads.requires_grad_(False).eval()
    if session.engine.main:
        session.terminal.note(
            "measuring the acceptance of the heads on held-out text, and the time of a step"
        )
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

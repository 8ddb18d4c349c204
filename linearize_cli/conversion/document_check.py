"""A check of document masking: documents packed into one row must not attend to each other."""

from inspect import signature

import torch
from transformers import PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.metrics.selfcheck import TOLERANCE, largest
from linearize_cli.models.batch import Blocks, causal_batch
from linearize_cli.runtime.dispatch import attention_implementation

LENGTHS = (5, 9)


@torch.no_grad()
def check_document_masking(model: PreTrainedModel, native: str) -> None:
    """Check that a document's logits do not depend on the document before it in the same row.

    Two documents are packed into one row. The second one's logits must equal those of the same document
    alone, in the softmax teacher and in the converted model.

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).

    Raises:
        UserError: a document attends to the one before it, or the model takes no position ids.
    """
    hint = "Remove recover.separate_documents. Documents are then read as one text."
    if "position_ids" not in signature(model.forward).parameters:
        raise UserError("recover.separate_documents: the model takes no position_ids", hint)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, sum(LENGTHS)), generator=generator).to(model.device)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, [0, LENGTHS[0]]] = True

    def logits(blocks: Blocks) -> torch.Tensor:
        return model(**causal_batch(blocks).inputs).logits[:, -LENGTHS[1] :]

    def difference() -> tuple[float, float]:
        behind, alone = logits(Blocks(ids, starts)), logits(Blocks(ids[:, LENGTHS[0] :]))
        return largest(behind, alone), TOLERANCE[alone.dtype] * max(1.0, alone.abs().max().item())

    model.eval()
    with attention_implementation(model, native):
        teacher = difference()
    for who, (actual, limit) in (("base", teacher), ("converted", difference())):
        if not actual <= limit:
            raise UserError(
                f"recover.separate_documents: in the {who} model a document attends to the one before it "
                f"(its logits differ by {actual:.2g})",
                hint,
            )

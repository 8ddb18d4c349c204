"""Whether a model keeps documents apart that are packed into one row."""

from inspect import signature

import torch
from transformers import PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.metrics.selfcheck import TOLERANCE, largest
from linearize_cli.models.batch import Blocks, causal_batch
from linearize_cli.runtime.dispatch import attention_implementation

LENGTHS = (5, 9)


@torch.no_grad()
def check_apart(model: PreTrainedModel, native: str) -> None:
    """Compare a document behind another with the same document alone, in the softmax teacher and converted.

    Raises:
        UserError: one of the two lets a document see what lies before it.
    """
    hint = "Leave out recover.separate_documents: documents are then read as one text."
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
                f"recover.separate_documents: the {who} model lets a document see the one before it "
                f"(its logits differ by {actual:.2g})",
                hint,
            )

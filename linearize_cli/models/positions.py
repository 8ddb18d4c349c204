"""The number of positions that a model can take."""

from torch import nn
from transformers import PreTrainedModel


def context_length(model: PreTrainedModel) -> int:
    """Return the largest number of tokens in a row.

    It is less than the number of learned positions if some of these are reserved for pads (RoBERTa).
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    for module in model.modules():
        positions = isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
        if positions and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def last_position(model: PreTrainedModel) -> int | None:
    """Return the number of positions that the model has. It cannot read longer rows.

    Return None if the positions are computed (RoPE, ALiBi) or if there are none. A limit exists if they are
    learned or held in a table.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    embeddings = [
        [module.num_embeddings]
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    sizes = {size for shape in (*embeddings, *(b.shape for b in model.buffers())) for size in shape}
    # Some tables hold a few more rows (OPT's two).
    return context_length(model) if any(limit <= size <= limit + 8 for size in sizes) else None


def reach(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that a converted model can read, or None if it has no limit.

    A model with layers that stay softmax is limited to its context, because such a layer may have its own
    table of positions.
    """
    last = last_position(model)
    return context_length(model) if last is None and model.config.linearize["softmax"] else last

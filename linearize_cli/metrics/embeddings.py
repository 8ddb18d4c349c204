"""The agreement of two models about which texts are similar."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def similarities(embeddings: Tensor) -> Tensor:
    """Return the cosine of each pair of different texts, `[N (N - 1) / 2]`.

    Args:
        embeddings: `[N, width]`.
    """
    vectors = normalize(embeddings, dim=-1)
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[first, second]


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each of `[N]` values, from 0, in fp64."""
    return values.argsort().argsort().double()


def rank_correlation(teacher: Tensor, student: Tensor) -> float | None:
    """Return Spearman's rank correlation of the similarities of all pairs of texts.

    Return None for fewer than three texts.

    Args:
        teacher, student: each model's embeddings of the same texts, `[N, width]`.
    """
    if len(teacher) < 3:
        return None
    return torch.corrcoef(torch.stack([ranks(similarities(x)) for x in (teacher, student)]))[0, 1].item()

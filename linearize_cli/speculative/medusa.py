"""Medusa heads (arXiv 2401.10774): predictions of the tokens after the next one, from the last hidden state."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.files import replacing
from linearize_cli.models.task import Task
from linearize_cli.models.tasks import CausalLM
from linearize_cli.speculative.decode import cannot_branch, why_no_tree
from linearize_cli.speculative.drafts import Draft
from linearize_cli.speculative.trees import Choices, Rates, chain, is_choices

FILE = "medusa.safetensors"


class MedusaHeads(nn.Module):
    """K Medusa heads, computed in one batched product.

    The LM head predicts the next token from the last hidden state h. From the same h, head k = 1, ..., K
    predicts the token k positions after that one. Its logits are `U_k (h + SiLU(W_k h + b_k))`.

    Attributes:
        weight: W, `[K, width, width]`.
        bias: b, `[K, width]`.
        output: U, `[K, vocab, width]`.
        output_bias: `[K, vocab]`, or None if the LM head has no bias.
        acceptance: `acceptance[k - 1][r]`, the share of cases in which the candidate of rank r (0 is the most
            probable) of head k is the right token. Empty if it was not measured.
        tree: the tree with the most expected tokens per second on the machine where the heads were tuned.
    """

    def __init__(self, heads: int, width: int, vocabulary: int, has_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))
        self.output = nn.Parameter(torch.zeros(heads, vocabulary, width))
        self.output_bias = nn.Parameter(torch.zeros(heads, vocabulary)) if has_bias else None
        self.acceptance: Rates = []
        self.tree = chain(heads)

    @classmethod
    def of(cls, model: PreTrainedModel, heads: int) -> "MedusaHeads":
        """Return new heads that all predict what the model's LM head does, in fp32, on the model's device.

        Args:
            heads: the number of heads K.

        Raises:
            UserError: the LM head has no weight matrix.
        """
        made = cls(heads, *sizes(model))
        own = model.get_output_embeddings()
        with torch.no_grad():
            made.output.copy_(own.weight)
            if made.output_bias is not None:
                made.output_bias.copy_(own.bias)
        return made.to(model.device)

    def __len__(self) -> int:
        """Return the number of heads K."""
        return len(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits `[K, N, vocab]` of hidden states `[N, width]`."""
        rows = hidden.expand(len(self), *hidden.shape)
        states = rows + silu(torch.baddbmm(self.bias[:, None], rows, self.weight.mT))
        logits = states @ self.output.mT
        return logits if self.output_bias is None else logits + self.output_bias[:, None]

    def drafter(self, tree: Choices | None = None) -> "Medusa":
        """Return a drafter that proposes the heads' candidates as a token tree. With None it is the heads'
        own tree.
        """
        return Medusa(self, tree or self.tree)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write `medusa.safetensors` with the weights, the acceptance and the tree.

        An existing file is replaced only when the new one is complete.

        Args:
            folder: the artifact's folder.
            dtype: the dtype of the weights in the file.
        """
        tensors = {name: x.detach().to(dtype).contiguous().cpu() for name, x in self.named_parameters()}
        tree = [list(path) for path in self.tree.paths]
        facts = {"heads": len(self), "acceptance": self.acceptance, "tree": tree}
        with replacing(folder / FILE) as temporary:
            save_file(tensors, temporary, {key: json.dumps(value) for key, value in facts.items()})
            temporary.chmod((folder / "config.json").stat().st_mode)  # otherwise only the owner could read it


@dataclass(frozen=True)
class Medusa:
    """A drafter that proposes token trees from Medusa heads. A node at depth k with rank r is candidate r of
    head k.

    Attributes:
        heads: the Medusa heads.
        tree: the tree of candidates.
        buffers: a cache of `candidate_indices`, by device.
    """

    heads: MedusaHeads
    tree: Choices
    buffers: dict[torch.device, Tensor] = field(default_factory=dict)

    @cached_property
    def parents(self) -> list[int]:
        """Return the parent of each node, -1 for the root."""
        return self.tree.parents

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        """Fill the tree's nodes with the most probable candidate tokens of each head, for each row.

        Args:
            rows: all token ids of each row so far. The last one becomes the root.
            hidden: `[B, width]`, the hidden states from which the LM head predicted each row's last token.
        """
        root = torch.tensor([row[-1:] for row in rows], device=hidden.device)
        if not self.tree.paths:
            return Draft(root, self.parents)
        best = self.heads(hidden.to(self.heads.weight.dtype)).topk(self.tree.width).indices  # [K, B, width]
        nodes = best.transpose(0, 1).flatten(1)[:, self.candidate_indices(hidden.device)]
        return Draft(torch.cat([root, nodes], 1), self.parents)

    def candidate_indices(self, device: torch.device) -> Tensor:
        """Return the index `[N - 1]` of each node's token (without the root) in the list of all heads'
        candidates.

        The list is ordered by head, then by rank.
        """
        if device not in self.buffers:
            indices = [(len(path) - 1) * self.tree.width + path[-1] for path in self.tree.paths]
            self.buffers[device] = torch.tensor(indices, device=device)
        return self.buffers[device]


def sizes(model: PreTrainedModel) -> tuple[int, int, bool]:
    """Return the width and the vocabulary size of the model's LM head, and True if it has a bias.

    Raises:
        UserError: the LM head has no weight matrix.
    """
    own = model.get_output_embeddings()
    weight = getattr(own, "weight", None)
    if weight is None or weight.dim() != 2:
        raise UserError(
            f"{type(model).__name__} has no LM head (output embedding) that Medusa heads could start from",
            "Use --speculative lookup, which needs no heads.",
        )
    return weight.shape[1], weight.shape[0], getattr(own, "bias", None) is not None


@torch.no_grad()
def last_hidden(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return the last hidden states `[B, T, width]`, which the LM head reads.

    To save time, the LM head computes the logits of one token only, which are not used.

    Args:
        inputs: the arguments of the model's forward.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> tuple:
        seen.append(args[0])
        return (args[0][:, :1],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[-1]


def load_heads(folder: str | Path, model: PreTrainedModel) -> MedusaHeads:
    """Load the Medusa heads of an artifact's folder, in the model's dtype and on its device, without
    gradients.

    Raises:
        UserError: the folder has no heads, or they are damaged or belong to another model.
    """
    path = Path(folder) / FILE
    again = f"Train them: linearize heads {folder} --force"
    if not path.is_file():
        raise UserError(
            f"{folder} has no Medusa heads (no {FILE})",
            f"Train them with `linearize heads {folder}`, or use lookup.",
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if "heads" not in metadata:
            raise ValueError("it has no Medusa heads")
        if not all(x.isfinite().all() for x in tensors.values()):
            raise ValueError("some of its weights are not finite")
        facts = {key: json.loads(value) for key, value in metadata.items()}
        acceptance, tree = facts["acceptance"], facts["tree"]
        choices = Choices.of(tree) if is_choices(tree) or tree == [] else None
        rates = all(isinstance(rate, float | int) for rates in acceptance for rate in rates)
        if choices is None or not rates or facts["heads"] != len(tensors["weight"]):
            raise ValueError("its metadata do not fit its weights")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is damaged: {reason}", again) from None
    heads = MedusaHeads(facts["heads"], *sizes(model))
    expected = {name: tuple(x.shape) for name, x in heads.named_parameters()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        what = f"{path} belongs to another model: {name} is {found.get(name)}, and here {expected.get(name)}"
        raise UserError(what, again)
    if choices.depth > len(heads) or choices.width > heads.output.shape[1]:
        raise UserError(f"{path} is damaged: its tree needs more heads or candidates than it has", again)
    heads.load_state_dict(tensors)
    heads.acceptance, heads.tree = acceptance, choices
    return heads.to(model.device, model.dtype).requires_grad_(False).eval()


def check_heads(model: PreTrainedModel, task: type[Task]) -> None:
    """Check that a model can verify the token trees of speculative decoding.

    Args:
        task: the model's task, as a class.

    Raises:
        UserError: the model is not a causal language model, or cannot verify a token tree.
    """
    if task is not CausalLM:
        raise UserError(
            f"{type(model).__name__} is no causal language model: it has no next token to draft",
            "Medusa heads and --speculative are for decoders.",
        )
    why = why_no_tree(model)
    if why:
        raise cannot_branch(why)

"""Medusa heads (arXiv 2401.10774): what a model's last hidden state says about the tokens after the next one."""

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
from linearize_cli.models.tasks import CausalLM, Task
from linearize_cli.speculative.decode import cannot_branch, why_no_tree
from linearize_cli.speculative.drafts import Draft
from linearize_cli.speculative.trees import Choices, Rates, chain, is_choices

FILE = "medusa.safetensors"


class MedusaHeads(nn.Module):
    """K heads in one product. Head k = 1 .. K says, of the hidden state that the model's own head reads, the token k
    places after the one that the model's head says: `U_k (h + SiLU(W_k h + b_k))`.

    Attributes:
        weight: `[K, width, width]`; bias: `[K, width]`; output: `[K, vocab, width]`; output_bias: `[K, vocab]`, or
            None.
        acceptance: how often the r-th best candidate of head k is right, `acceptance[k - 1][r]`; empty: unknown.
        tree: the choices that are best on the machine where that was measured.
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
        """Heads that say what the model's own does, in fp32, where the model is.

        Raises:
            UserError: the model's own head is no matrix.
        """
        made = cls(heads, *sizes(model))
        own = model.get_output_embeddings()
        with torch.no_grad():
            made.output.copy_(own.weight)
            if made.output_bias is not None:
                made.output_bias.copy_(own.bias)
        return made.to(model.device)

    def __len__(self) -> int:
        return len(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, width] -> [K, N, vocab]`."""
        rows = hidden.expand(len(self), *hidden.shape)
        states = rows + silu(torch.baddbmm(self.bias[:, None], rows, self.weight.mT))
        logits = states @ self.output.mT
        return logits if self.output_bias is None else logits + self.output_bias[:, None]

    def drafter(self, tree: Choices | None = None) -> "Medusa":
        """What drafts a tree of the heads' candidates, their own if none is given."""
        return Medusa(self, tree or self.tree)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write `medusa.safetensors`, as a whole or not at all."""
        tensors = {name: x.detach().to(dtype).contiguous().cpu() for name, x in self.named_parameters()}
        tree = [list(path) for path in self.tree.paths]
        facts = {"heads": len(self), "acceptance": self.acceptance, "tree": tree}
        with replacing(folder / FILE) as beside:
            save_file(tensors, beside, {key: json.dumps(value) for key, value in facts.items()})
            beside.chmod((folder / "config.json").stat().st_mode)  # else readable for its owner alone


@dataclass(frozen=True)
class Medusa:
    """Drafts a tree of the heads' best candidates: a node of depth k and rank r is the candidate r of head k."""

    heads: MedusaHeads
    tree: Choices
    buffers: dict[torch.device, Tensor] = field(default_factory=dict)

    @cached_property
    def parents(self) -> list[int]:
        return self.tree.parents

    def draft(self, rows: Sequence[Sequence[int]], hidden: Tensor) -> Draft:
        root = torch.tensor([row[-1:] for row in rows], device=hidden.device)
        if not self.tree.paths:
            return Draft(root, self.parents)
        best = self.heads(hidden.to(self.heads.weight.dtype)).topk(self.tree.width).indices  # [K, B, width]
        nodes = best.transpose(0, 1).flatten(1)[:, self.places(hidden.device)]
        return Draft(torch.cat([root, nodes], 1), self.parents)

    def places(self, device: torch.device) -> Tensor:
        """Where each node's token stands among all candidates of a row, head by head."""
        if device not in self.buffers:
            places = [(len(path) - 1) * self.tree.width + path[-1] for path in self.tree.paths]
            self.buffers[device] = torch.tensor(places, device=device)
        return self.buffers[device]


def sizes(model: PreTrainedModel) -> tuple[int, int, bool]:
    """The width and the vocabulary of the model's own head, and whether it has a bias.

    Raises:
        UserError: it is no matrix.
    """
    own = model.get_output_embeddings()
    weight = getattr(own, "weight", None)
    if weight is None or weight.dim() != 2:
        raise UserError(
            f"{type(model).__name__} has no output embedding that heads could start from",
            "Use --speculative lookup, which needs no heads.",
        )
    return weight.shape[1], weight.shape[0], getattr(own, "bias", None) is not None


@torch.no_grad()
def last_hidden(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """`[B, T, width]`: what the model's head reads; it is given one token to read, for its logits are not needed."""
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
    """The heads that an artifact's folder holds, in the model's dtype and on its device.

    Raises:
        UserError: it holds none, they are damaged, or they are another model's.
    """
    path = Path(folder) / FILE
    again = f"Train them: linearize heads {folder} --force"
    if not path.is_file():
        raise UserError(
            f"{folder} has no Medusa heads (no {FILE})",
            f"Train them: linearize heads {folder}. Or use lookup.",
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if "heads" not in metadata:
            raise ValueError("it holds no Medusa heads")
        if not all(x.isfinite().all() for x in tensors.values()):
            raise ValueError("its numbers are not finite")
        facts = {key: json.loads(value) for key, value in metadata.items()}
        acceptance, tree = facts["acceptance"], facts["tree"]
        choices = Choices.of(tree) if is_choices(tree) or tree == [] else None
        rates = all(isinstance(rate, float | int) for rates in acceptance for rate in rates)
        if choices is None or not rates or facts["heads"] != len(tensors["weight"]):
            raise ValueError("its metadata do not fit it")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is damaged: {reason}", again) from None
    heads = MedusaHeads(facts["heads"], *sizes(model))
    expected = {name: tuple(x.shape) for name, x in heads.named_parameters()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(
            f"{path} is of another model: {name} is {found.get(name)}, here it is {expected.get(name)}", again
        )
    if choices.depth > len(heads) or choices.width > heads.output.shape[1]:
        raise UserError(f"{path} is damaged: its tree is beyond its heads", again)
    heads.load_state_dict(tensors)
    heads.acceptance, heads.tree = acceptance, choices
    return heads.to(model.device, model.dtype).requires_grad_(False).eval()


def check_heads(model: PreTrainedModel, task: type[Task]) -> None:
    """Check that Medusa heads can draft for a model.

    Raises:
        UserError: the model writes no text from left to right, or cannot verify a tree.
    """
    if task is not CausalLM:
        raise UserError(
            f"{type(model).__name__} is no causal language model: it has no next token to draft",
            "Medusa heads and --speculative are for decoders.",
        )
    why = why_no_tree(model)
    if why:
        raise cannot_branch(why)

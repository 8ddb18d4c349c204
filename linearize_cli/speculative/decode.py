"""The loop of speculative decoding, of any number of rows at once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.models.decoding import forward, pad_left
from linearize_cli.runtime.tree import read_by_head
from linearize_cli.speculative.accept import Greedy, Rule, longest
from linearize_cli.speculative.drafts import Drafter


@dataclass(frozen=True)
class Step:
    """What one forward of the target gave.

    Attributes:
        tokens: new tokens of each row; none of a row that has ended.
        accepted: how deep in each row's tree the accepted path went; None for the prompt's forward, and for a row
            that has ended.
        nodes: of the tree.
    """

    tokens: list[list[int]]
    accepted: list[int | None]
    nodes: int


@torch.inference_mode()
def speculate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    drafter: Drafter,
    max_new: int,
    rule: Rule | None = None,
    stop: Sequence[int] = (),
    context: int | None = None,
) -> Iterator[Step]:
    """Continue prompts with a linearized model; a step of the iteration is a forward of the model.

    Args:
        prompts: each of at least one token.
        max_new: tokens to generate for each.
        rule: how tokens are chosen; None: greedily.
        stop: tokens that end a row; the row has it as its last.
        context: positions that the model has, where a row ends; None: any number.

    Raises:
        UserError: a layer keeps what no tree can branch off, or a prompt leaves no position.
    """
    rule, stop = rule or Greedy(), set(stop)
    rows, left = [list(prompt) for prompt in prompts], [max_new] * len(prompts)
    if context is not None:
        left = [min(max_new, context - len(row)) for row in rows]
        if min(left) < 1:
            what = (
                f"a prompt of {max(map(len, rows))} tokens leaves no room: the model has {context} positions"
            )
            raise UserError(what, "Shorten the prompt.")
    cache, hidden, logits = prefill(model, rows)

    def take(row: int, tokens: list[int]) -> list[int]:
        """Append tokens to a row, up to its end; what was appended."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
        tokens = tokens[: min(end, left[row])]
        left[row] = 0 if tokens[-1] in stop else left[row] - len(tokens)
        rows[row] += tokens
        return tokens

    none = torch.full((1,), -1, device=model.device)
    last = torch.tensor([row[-1:] for row in rows], device=model.device)
    _, first = rule(logits[:, None], last, none)
    yield Step([take(row, tokens) for row, tokens in enumerate(first.tolist())], [None] * len(rows), 1)
    while any(left):
        room = max(left) - 1
        if context is not None:
            room = min(room, context - max(map(len, rows)))
        draft = drafter.draft(rows, hidden).at_most(room)
        try:
            tree = model.read_tree(cache, draft.ids, draft.parents)
        except NotImplementedError as error:
            raise cannot_branch(error) from None
        parents = torch.tensor(list(draft.parents), device=draft.ids.device)
        accepted, following = rule(tree.logits, draft.ids, parents)
        last = longest(accepted, tree.shape.visible)
        hidden = tree.hidden[torch.arange(len(rows)), last]
        paths, tokens = [], []
        after = following.gather(1, last[:, None]).squeeze(1).tolist()
        for row, node in enumerate(last.tolist()):
            if not left[row]:
                paths.append([])
                tokens.append([])
                continue
            path = tree.path(node)
            paths.append(path)
            tokens.append(take(row, [*draft.ids[row, path[1:]].tolist(), after[row]]))
        yield Step(tokens, [len(path) - 1 if path else None for path in paths], len(draft.parents))
        if any(left):
            tree.commit(*paths)


def written(steps: Iterable[Step]) -> list[list[int]]:
    """The new tokens of each row."""
    rows = zip(*(step.tokens for step in steps), strict=True)
    return [[token for tokens in pieces for token in tokens] for pieces in rows]


@torch.inference_mode()
def why_no_tree(model: PreTrainedModel) -> str | None:
    """Why no token tree can branch off what the model keeps; None: it can."""
    cache, _, _ = prefill(model, [[0]])
    try:
        model.read_tree(cache, torch.zeros(1, 3, dtype=torch.long, device=model.device), [-1, 0, 0])
    except NotImplementedError as error:
        return str(error)
    return None


def cannot_branch(why: object) -> UserError:
    hint = "It decodes without drafts: linearize generate ARTIFACT PROMPT."
    return UserError(f"the model cannot verify a token tree: {why}", hint)


def prefill(model: PreTrainedModel, rows: list[list[int]]) -> tuple[Cache, Tensor, Tensor]:
    """The cache after the rows, and the last tokens' hidden states `[B, width]` and logits `[B, vocab]`."""
    ids, mask = pad_left([torch.tensor(row, device=model.device) for row in rows])
    cache = DynamicCache(config=model.config)
    with read_by_head(model) as hidden:
        logits = forward(model, ids, cache, mask)
    return cache, hidden[-1][:, -1], logits[:, -1]

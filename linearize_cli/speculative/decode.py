"""The loop of speculative decoding, for a batch of any size."""

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
    """The result of one forward of the target, the model whose text is generated.

    Attributes:
        tokens: the new tokens of each row. The list is empty for a row that has ended.
        accepted: for each row, the number of drafted tokens that were accepted. None for the prompt's
            forward, and for a row that has ended.
        nodes: the number of nodes of each row's token tree, including the root.
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
    """Continue prompts with a linearized model by speculative decoding.

    It yields a step for each forward of the model. The first is the prompts' own forward, which gives one
    token.

    Args:
        model: the model whose text is generated.
        prompts: token ids, at least one for each prompt.
        drafter: proposes the token trees.
        max_new: the most new tokens for each prompt.
        rule: the acceptance rule. None is greedy.
        stop: tokens that end a row. The row includes the token.
        context: the number of positions of the model, at which a row ends. None is unlimited.

    Raises:
        UserError: a layer's cache cannot branch into a tree, or a prompt fills the context.
    """
    rule, stop = rule or Greedy(), set(stop)
    rows, left = [list(prompt) for prompt in prompts], [max_new] * len(prompts)
    if context is not None:
        left = [min(max_new, context - len(row)) for row in rows]
        if min(left) < 1:
            what = f"a prompt of {max(map(len, rows))} tokens fills the model's {context} positions, so none is left"
            raise UserError(what, "Shorten the prompt.")
    cache, hidden, logits = prefill(model, rows)

    def take(row: int, tokens: list[int]) -> list[int]:
        """Append tokens to a row, up to a stop token or the row's limit, and return the appended ones."""
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
    """Return the new tokens of each row, joined over all steps."""
    rows = zip(*(step.tokens for step in steps), strict=True)
    return [[token for tokens in row for token in tokens] for row in rows]


@torch.inference_mode()
def why_no_tree(model: PreTrainedModel) -> str | None:
    """Return why the model cannot verify a token tree, or None if it can. To find out, a small tree is
    verified.
    """
    cache, _, _ = prefill(model, [[0]])
    try:
        model.read_tree(cache, torch.zeros(1, 3, dtype=torch.long, device=model.device), [-1, 0, 0])
    except NotImplementedError as error:
        return str(error)
    return None


def cannot_branch(why: object) -> UserError:
    """Return the error for a model that cannot verify a token tree. `why` is the reason, for its message."""
    hint = "Decode without speculation: linearize generate ARTIFACT PROMPT."
    return UserError(f"the model cannot verify a token tree: {why}", hint)


def prefill(model: PreTrainedModel, rows: list[list[int]]) -> tuple[Cache, Tensor, Tensor]:
    """Run the model on the prompts.

    Args:
        rows: the token ids of each prompt.

    Returns:
        The cache, and the last hidden states `[B, width]` and logits `[B, vocab]` at each prompt's last
        token.
    """
    ids, mask = pad_left([torch.tensor(row, device=model.device) for row in rows])
    cache = DynamicCache(config=model.config)
    with read_by_head(model) as hidden:
        logits = forward(model, ids, cache, mask)
    return cache, hidden[-1][:, -1], logits[:, -1]

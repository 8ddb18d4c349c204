"""A model whose layers come to the device when they are needed: one while it runs, or a block while it learns.

Weights are loaded onto the CPU, where transformers maps them from the checkpoint's files: the host's memory holds no
more of them than the operating system keeps in its page cache, and the device no more than is copied there.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize_cli.errors import UserError
from linearize_cli.models.batch import Batch
from linearize_cli.runtime.dispatch import attention_implementation

KEY = "recover.transfer.block_layers"


class Finished(Exception):
    """Ends a forward behind a block's last layer; `hidden` is what that layer returned."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@dataclass(frozen=True)
class LayerBlocks:
    """The layers of a model in blocks of `size`, and the device that they visit.

    Attributes:
        name: of the `nn.ModuleList` that holds the layers.
        count: of the layers up to the last one that is converted; those behind it never run in transfer.
    """

    name: str
    size: int
    count: int
    device: str

    @classmethod
    def of(cls, model: PreTrainedModel, converted: Sequence[str], size: int, device: str) -> "LayerBlocks":
        """
        Args:
            converted: the names of the attention modules that are or will be linear.

        Raises:
            UserError: they do not lie in one list of layers.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and all(x.startswith(f"{name}.") for x in converted):
                count = 1 + max(int(x[len(name) + 1 :].partition(".")[0]) for x in converted)
                return cls(name, size, count, device)
        raise UserError(
            f"{KEY}: the layers to convert of {type(model).__name__} do not stand in one list",
            f"Pass --set {KEY}=0: all layers learn at once.",
        )

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.name)

    def ranges(self) -> list[range]:
        """The indices of each block's layers."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]

    @contextmanager
    def streamed(self, model: PreTrainedModel) -> Iterator[None]:
        """While open, the whole model runs on the device: a layer is there while it runs, the rest throughout."""
        if torch.device(self.device).type == "cpu":  # mapped weights serve as they are
            yield
            return
        with ExitStack() as opened:
            opened.enter_context(moved(self.others(model), self.device))
            for layer in self.layers(model):
                visit = ExitStack()

                def enter(module: nn.Module, args: tuple, visit: ExitStack = visit) -> None:
                    visit.enter_context(moved(tensors(module), self.device))

                def leave(module: nn.Module, args: tuple, output: Any, visit: ExitStack = visit) -> None:
                    visit.close()

                opened.callback(layer.register_forward_pre_hook(enter).remove)
                opened.callback(layer.register_forward_hook(leave, always_call=True).remove)
            yield

    @contextmanager
    def resident(self, model: PreTrainedModel, block: range) -> Iterator[None]:
        """While open, a block is on the device, and what else of the model a forward up to it needs."""
        head = model.get_output_embeddings()
        entry = {id(x) for x in tensors(model.get_input_embeddings())}
        unused = {id(x) for x in tensors(head)} - entry if head is not None else set()
        others = [x for x in self.others(model) if id(x) not in unused]
        with moved(chain(others, *(tensors(self.layers(model)[i]) for i in block)), self.device):
            yield

    def others(self, model: PreTrainedModel) -> list[Tensor]:
        """The parameters and buffers outside the layers."""
        inside = {id(x) for x in tensors(self.layers(model))}
        return [x for x in tensors(model) if id(x) not in inside]


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def moved(some: Iterable[Tensor], device: str) -> Iterator[None]:
    """While open, these tensors hold copies on the device; what they have learned goes back where they were."""
    homes = [(x, x.data) for x in {id(x): x for x in some}.values()]
    try:
        for x, home in homes:
            x.data = home.to(device, copy=True)
        yield
    finally:
        for x, home in homes:
            if x.requires_grad:
                home.copy_(x.data)
            x.data, x.grad = home, None


@contextmanager
def alone(layers: nn.ModuleList, block: range, entering: Tensor | None, returns: list[int]) -> Iterator[None]:
    """While open, a forward of the model runs the layers of `block` only, from the hidden states `entering` on
    (None: the embeddings'), and raises Finished. Its own code makes embeddings, positions and masks.

    Args:
        returns: see `returned`.
    """
    skipped = [layers[i] for i in range(block.start)]
    try:
        for layer, length in zip(skipped, returns, strict=False):
            output = entering if length == 0 else (entering, *[None] * (length - 1))
            layer.forward = lambda *args, output=output, **kwargs: output

        def finish(module: nn.Module, args: tuple, output: Any) -> None:
            raise Finished(hidden_of(output))

        hook = layers[block[-1]].register_forward_hook(finish)
        yield
    finally:
        hook.remove()
        for layer in skipped:
            del layer.forward


def hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def leaving(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The hidden states behind the block, of a forward with `alone` open."""
    try:
        model(**inputs)
    except Finished as finished:
        return finished.hidden.detach()
    raise RuntimeError("the block's last layer did not run")


@torch.no_grad()
def returned(blocks: LayerBlocks, model: PreTrainedModel, native: str, batch: Batch) -> list[int]:
    """How long a tuple each layer returns, 0 for a plain tensor, seen on the batch's first row.

    Raises:
        UserError: a block alone does not compute what it computes in the model: its layers share more than the
            hidden states that go from one to the next.
    """
    layers, lengths, outputs = blocks.layers(model), {}, {}
    inputs = {
        name: x[:1].to(blocks.device) if isinstance(x, Tensor) else x for name, x in batch.inputs.items()
    }

    def record(index: int, output: Any) -> None:
        lengths[index] = len(output) if isinstance(output, tuple) else 0
        outputs[index] = hidden_of(output).clone()

    with attention_implementation(model, native):
        with ExitStack() as hooks, blocks.streamed(model):
            for i, layer in enumerate(layers):
                hook = layer.register_forward_hook(lambda m, args, output, i=i: record(i, output))
                hooks.callback(hook.remove)
            model(**inputs)
        returns = [lengths.get(i, 0) for i in range(len(layers))]
        for block in blocks.ranges():
            try:
                with blocks.resident(model, block), alone(layers, block, outputs.get(block[0] - 1), returns):
                    actual, expected = leaving(model, inputs).float(), outputs[block[-1]].float()
                same = torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AttributeError, TypeError, KeyError, IndexError, ValueError):
                same = False
            if not same:
                raise UserError(
                    f"{KEY}: layers {block[0]} to {block[-1]} of {type(model).__name__} do not run alone: they take "
                    "more from earlier layers than hidden states",
                    f"Pass --set {KEY}=0: all layers learn at once.",
                )
    return returns


def to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

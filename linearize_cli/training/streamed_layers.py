"""Layers that are copied to the device only while they are needed: one during its forward, or a block during
its training.

The weights are on the CPU, where transformers maps them from the checkpoint's files. The host holds no more
of them than its page cache does, and the device no more than the copies.
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
    """The exception that ends a model's forward after the last layer of a block. `hidden` is the output of
    that layer.
    """

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@dataclass(frozen=True)
class LayerBlocks:
    """The layers of a model in blocks of `size` consecutive layers, and the device that they are copied to.

    Attributes:
        name: the name of the `nn.ModuleList` of layers in the model.
        size: the number of layers in a block. The last block may have fewer.
        count: the number of layers up to the last converted one. Transfer does not run the layers after it.
        device: the name of the torch device.
    """

    name: str
    size: int
    count: int
    device: str

    @classmethod
    def of(cls, model: PreTrainedModel, converted: Sequence[str], size: int, device: str) -> "LayerBlocks":
        """Find the list of layers that contains all converted modules.

        Args:
            converted: the names of the attention modules that are or will be linear.

        Raises:
            UserError: no list contains all of them.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and all(x.startswith(f"{name}.") for x in converted):
                count = 1 + max(int(x[len(name) + 1 :].partition(".")[0]) for x in converted)
                return cls(name, size, count, device)
        raise UserError(
            f"{KEY}: the layers of {type(model).__name__} to convert are not in one list of layers",
            f"Pass --set {KEY}=0 to train all layers at once.",
        )

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the model's list of layers."""
        return model.get_submodule(self.name)

    def ranges(self) -> list[range]:
        """Return the layer indices of each block."""
        return [range(i, min(i + self.size, self.count)) for i in range(0, self.count, self.size)]

    @contextmanager
    def streamed(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the whole model run on the device while the context is open.

        A layer is on the device during its forward only, and the rest of the model all the time. If the
        device is the CPU, nothing is copied.
        """
        if torch.device(self.device).type == "cpu":  # the mapped weights can be used directly
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
        """Keep a block of layers on the device while the context is open.

        Everything else that a forward up to the block's last layer needs (such as embeddings) is there too.

        Args:
            block: the layer indices of the block.
        """
        head = model.get_output_embeddings()
        entry = {id(x) for x in tensors(model.get_input_embeddings())}
        unused = {id(x) for x in tensors(head)} - entry if head is not None else set()
        others = [x for x in self.others(model) if id(x) not in unused]
        with moved(chain(others, *(tensors(self.layers(model)[i]) for i in block)), self.device):
            yield

    def others(self, model: PreTrainedModel) -> list[Tensor]:
        """Return the model's parameters and buffers that are not in its list of layers (embeddings, norms, LM
        head).
        """
        inside = {id(x) for x in tensors(self.layers(model))}
        return [x for x in tensors(model) if id(x) not in inside]


def tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


@contextmanager
def moved(some: Iterable[Tensor], device: str) -> Iterator[None]:
    """Replace tensors by copies on the device while the context is open.

    At the end the originals return, with the new values of those that require gradients.
    """
    originals = [(x, x.data) for x in {id(x): x for x in some}.values()]
    try:
        for x, original in originals:
            x.data = original.to(device, copy=True)
        yield
    finally:
        for x, original in originals:
            if x.requires_grad:
                original.copy_(x.data)
            x.data, x.grad = original, None


@contextmanager
def only_block(
    layers: nn.ModuleList, block: range, entering: Tensor | None, returns: list[int]
) -> Iterator[None]:
    """Make a forward of the model run only the layers of `block`, while the context is open.

    The model's own code computes embeddings, positions and masks. The layers before the block are skipped.
    After the block the forward ends with the exception Finished, which holds the block's output.

    Args:
        layers: the model's list of layers.
        block: the layer indices of the block.
        entering: the hidden states `[B, T, width]` at the input of the block. None for the first block, which
            starts from the embeddings.
        returns: the length of each layer's output tuple, 0 for a layer that returns a plain tensor.
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
    """Return the hidden states `[B, T, width]` from a layer's output, which is a tensor or a tuple that
    begins with it.
    """
    return output[0] if isinstance(output, tuple) else output


def hidden_after(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Run a forward in the context of `only_block`, and return the hidden states `[B, T, width]` after the
    block.
    """
    try:
        model(**inputs)
    except Finished as finished:
        return finished.hidden.detach()
    raise RuntimeError("the block's last layer did not run")


@torch.no_grad()
def output_lengths(blocks: LayerBlocks, model: PreTrainedModel, native: str, batch: Batch) -> list[int]:
    """Measure, on the first row of a batch, the length of each layer's output tuple. It is 0 for a layer that
    returns a plain tensor.

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).

    Raises:
        UserError: a block alone computes another result than in the whole model, because its layers share
            more than hidden states with earlier layers.
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
                with (
                    blocks.resident(model, block),
                    only_block(layers, block, outputs.get(block[0] - 1), returns),
                ):
                    actual, expected = hidden_after(model, inputs).float(), outputs[block[-1]].float()
                same = torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AttributeError, TypeError, KeyError, IndexError, ValueError):
                same = False
            if not same:
                raise UserError(
                    f"{KEY}: layers {block[0]} to {block[-1]} of {type(model).__name__} cannot run alone: "
                    "they use more from earlier layers than hidden states",
                    f"Pass --set {KEY}=0 to train all layers at once.",
                )
    return returns


def to(value: Any, device: str) -> Any:
    """Return a tensor on the device, or any other value unchanged."""
    return value.to(device) if isinstance(value, Tensor) else value

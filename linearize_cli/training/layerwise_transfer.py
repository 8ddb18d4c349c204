"""Attention transfer one block of consecutive layers at a time, for models larger than the device's memory.

A block is copied to the device, trained on all batches, and replaced by the next one. Its outputs are the
teacher's hidden states, which are kept on disk as the inputs of the next block. Every layer of the teacher
therefore runs once per batch, as in transfer without blocks, and is read from disk once.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize_cli.files import replacing
from linearize_cli.models.batch import Batch
from linearize_cli.training.attention_transfer import WindowDropout, shorter_windows, transferring
from linearize_cli.training.checkpoint import Session
from linearize_cli.training.objective import Objective
from linearize_cli.training.streamed_layers import LayerBlocks, hidden_after, only_block, output_lengths


def transfer_by_blocks(
    model: PreTrainedModel,
    native: str,
    windows: WindowDropout,
    blocks: LayerBlocks,
    batches: Callable[[int], Iterator[Batch]],
    steps: int,
    session: Session,
) -> Iterator["BlockTransfer"]:
    """Yield a training objective for each block of consecutive layers in turn. The caller trains it before it
    asks for the next.

    While a block is trained, only its layers are on the device. The session's checkpoint counts the finished
    blocks, and its folder keeps their outputs and parameters. An interrupted run continues with the first
    unfinished block.

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).
        windows: chooses the training steps with a shorter window.
        blocks: the blocks of layers and their device.
        batches: a function that takes a number of batches to skip, and returns the batches that follow.
        steps: the number of batches on which each block is trained.
        session: the run's processes, folder and progress.

    Raises:
        UserError: the layers of this model cannot run in blocks.
    """
    checkpoint, folder = session.checkpoint, session.folder
    hidden, learned = HiddenStates(folder / "hidden"), folder / "blocks"
    returns = output_lengths(blocks, model, native, next(batches(0)))
    for block in blocks.ranges():
        objective = BlockTransfer(model, native, windows, blocks, returns, block, hidden)
        file = learned / f"{block[0]}.safetensors"
        if block[0] < checkpoint.results.get("transferred_layers", 0):
            objective.load_state_dict(load_file(file))
            continue
        with blocks.resident(model, block):
            done = 0
            if objective.learning:
                yield objective
                done = checkpoint.step
            if (
                block.stop < blocks.count
            ):  # the next block needs the outputs for all batches, even if this one stopped early
                objective.step = None
                with torch.no_grad():
                    for batch in islice(batches(done), steps - done):
                        objective(batch)
        session.engine.accelerator.wait_for_everyone()
        checkpoint.results["transferred_layers"] = block.stop
        checkpoint.stage, checkpoint.step, checkpoint.parameters, checkpoint.optimizer = "", 0, {}, {}
        if session.engine.main:
            save_whole(objective.state_dict(), file)
            session.save()
            hidden.drop(block[0])


class HiddenStates:
    """Files with the teacher's hidden states between two blocks of layers, `[T, width]` for each row of
    tokens.

    A file is named by a hash of the row's inputs, and is either complete or absent. A row that occurs again
    finds its file, whichever process, batch or run wrote it. A block is named by the index of its first
    layer.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def files(self, index: int, batch: Batch) -> list[Path]:
        """Return the path of each row's file, with the hidden states at the input of the block whose first
        layer is `index`.
        """
        rows = [x.cpu() for x in batch.inputs.values() if isinstance(x, Tensor)]
        names = (hashlib.sha1(b"".join(x[i].numpy().tobytes() for x in rows)) for i in range(len(rows[0])))
        return [self.folder / str(index) / f"{name.hexdigest()}.safetensors" for name in names]

    def read(self, index: int, batch: Batch, device: str) -> Tensor:
        """Read the hidden states `[B, T, width]` of a batch at the input of the block of layers that begins
        with layer `index`.
        """
        return torch.stack([load_file(file)["hidden"] for file in self.files(index, batch)]).to(device)

    def write(self, index: int, batch: Batch, hidden: Tensor) -> None:
        """Write the hidden states `[B, T, width]` of a batch at the input of the block of layers that begins
        with layer `index`.
        """
        for file, row in zip(self.files(index, batch), hidden.cpu(), strict=True):
            save_whole({"hidden": row}, file)

    def drop(self, index: int) -> None:
        """Delete the hidden states at the input of the block of layers that begins with layer `index`."""
        shutil.rmtree(self.folder / str(index), ignore_errors=True)


def save_whole(content: dict[str, Tensor], file: Path) -> None:
    """Write tensors to a file atomically. Several processes may write the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, f".{os.getpid()}", sync=False) as temporary:
        save_file({name: x.contiguous() for name, x in content.items()}, temporary)


class BlockTransfer(Objective):
    """The training objective of attention transfer for one block of layers: the sum of its linear layers'
    losses.

    Each loss is the error of a linear layer's output against that of the softmax attention it replaces. The
    forward runs the block only, and stores its outputs as the inputs of the next block. Only the trained
    modules are registered as submodules, because most of the model is not on the device.

    Args:
        native: the attention implementation of the base model (`sdpa`, `eager`).
        windows: chooses the training steps with a shorter window.
        blocks: all blocks of layers, and their device.
        returns: the length of each layer's output tuple, 0 for a layer that returns a plain tensor.
        block: the layer indices of this block.
        hidden: the files of the hidden states between blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        native: str,
        windows: WindowDropout,
        blocks: LayerBlocks,
        returns: list[int],
        block: range,
        hidden: HiddenStates,
    ):
        super().__init__()
        self.teacher, self.windows = (model, native), windows
        self.blocks, self.returns = blocks, returns
        self.block, self.hidden = block, hidden
        layers = (f"{blocks.name}.{i}" for i in block)
        found = (
            (name, module)
            for layer in layers
            for name, module in model.get_submodule(layer).named_modules(prefix=layer)
        )
        self.learning = nn.ModuleDict(
            {
                name.replace(".", "/"): m.linear_attention
                for name, m in found
                if hasattr(m, "linear_attention")
            }
        )

    def independent(self) -> list[list[nn.Parameter]]:
        """Return the trained parameters of each layer, as one list per layer. The gradients of a list are
        clipped together.
        """
        return [list(module.parameters()) for module in self.learning.values()]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        (model, native), blocks, first = self.teacher, self.blocks, self.block[0]
        entering = self.hidden.read(first, batch, blocks.device) if first else None
        layers = blocks.layers(model)
        share = None if self.step is None else self.windows.at(self.step)
        with (
            shorter_windows(model, share),
            transferring(model, native) as losses,
            only_block(layers, self.block, entering, self.returns),
        ):
            after = hidden_after(model, batch.inputs)
        if self.block.stop < blocks.count:
            self.hidden.write(self.block.stop, batch, after)
        return sum(losses.values()), {"layers": {name: loss.detach() for name, loss in losses.items()}}

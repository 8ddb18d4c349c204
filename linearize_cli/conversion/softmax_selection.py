"""`--keep-softmax auto:N`: keep the layers whose return to softmax lowers the distance from the teacher most, on
text and on repeated text.

On repeated text the teacher copies the first half of a block, by attention to tokens far outside the window. Ordinary
text seldom needs this. Without repeated text, the layers that copy might not be chosen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize_cli.models.batch import Blocks
from linearize_cli.models.task import Task
from linearize_cli.runtime.adapt import adapted
from linearize_cli.runtime.dispatch import attention_implementation, set_config

NONE = "none"  # the key of the model with all layers linear
REPEATED = "repeated_kl"  # the name of the distance on repeated text in reports
ROWS, TOKENS = 32, 4096  # the most blocks of text to measure on, and about the most tokens


def best(measures: Sequence[dict[str, float]], count: int) -> list[str]:
    """Return the `count` layers that lower the distances most when they are softmax again, in the model's order.

    All measures have the same weight: the distances of each are divided by its distance with every layer linear.

    Args:
        measures: the distances from the teacher on each kind of text, under each layer's name, with that layer
            alone softmax (see `Restorer.distances`).
    """
    layers = [name for name in measures[0] if name != NONE]
    scores = {name: sum(found[name] / (found[NONE] or 1) for found in measures) for name in layers}
    chosen = sorted(layers, key=scores.__getitem__)[:count]
    return [name for name in layers if name in chosen]


def repeated(batches: Sequence[Blocks | Tensor]) -> list[Tensor]:
    """Return the first half of the batches, `[B, L]` ids each. The second half of each block repeats its first."""
    ids = [batch.ids if isinstance(batch, Blocks) else batch for batch in batches[: -(-len(batches) // 2)]]
    return [torch.cat([x[:, : -(-x.shape[1] // 2)], x[:, : x.shape[1] // 2]], 1) for x in ids]


class Restorer:
    """A switch that returns converted layers to softmax attention: for a measurement (`restored`), or
    permanently (`restore`).

    It must be created before the conversion, because it remembers the config that each layer has then.

    Args:
        model: the model, which is not converted yet.
        names: the names of the attention modules that will be converted.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]):
        self.model, self.native = model, model.config._attn_implementation
        with adapted(model):  # it gives a config to modules that have none
            self.shared = {name: model.get_submodule(name).config for name in names}

    @contextmanager
    def restored(self, name: str) -> Iterator[None]:
        """Let one layer attend by softmax while the context is open.

        The base model's layers share one config, and a converted layer has its own. Both are set to softmax
        attention, because the model chooses its masks by the shared one. Linear layers accept any mask,
        softmax layers only their own.

        Args:
            name: the name of the layer.
        """
        configs = [self.model.get_submodule(name).config, self.shared[name]]
        before = [config._attn_implementation_internal for config in configs]
        for config in configs:
            config._attn_implementation_internal = self.native
        try:
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation_internal = implementation

    def restore(self, names: Sequence[str]) -> None:
        """Make layers softmax permanently, as if they had never been converted. `config.linearize` is
        updated.
        """
        record = self.model.config.linearize
        for name in names:
            module = self.model.get_submodule(name)
            del module.linear_attention, record["layers"][name]
            set_config(module, self.shared[name])
            module.config._attn_implementation_internal = self.native
        kept = {*record["softmax"], *names}
        record["softmax"] = [name for name, _ in self.model.named_modules() if name in kept]

    @torch.no_grad()
    def distances(
        self,
        task: Task,
        model: nn.Module,
        batches: Sequence[Blocks | Tensor],
        progress: Callable[[int], None],
    ) -> dict[str, float]:
        """Measure the distance from the teacher with every layer linear, and with each layer alone softmax.

        Args:
            task: the model's task, which measures the distance.
            model: the converted model, or a sharded copy that shares its configs.
            batches: batches of blocks, or ids `[B, L]`.
            progress: called with the number of tokens after each forward of the model.

        Returns:
            the mean distance: under `none` with every layer linear, and under each layer's name with that
                layer alone softmax.
        """
        model.eval()
        found = dict.fromkeys([NONE, *self.shared], 0.0)
        tokens = sum(ids.numel() for ids in batches)
        for ids in batches:
            with attention_implementation(model, self.native):
                teacher = task.observe(model, ids)
            for name in found:
                with nullcontext() if name == NONE else self.restored(name):
                    distance = task.distance(teacher, task.observe(model, ids))
                found[name] += distance * ids.numel() / tokens
                progress(ids.numel())
        return found

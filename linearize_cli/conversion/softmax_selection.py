"""`--keep-softmax auto:N`: the layers that the model misses most as softmax, by measured KL, and their return."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize_cli.models.batch import Batch, Blocks, causal_batch
from linearize_cli.runtime.adapt import adapted
from linearize_cli.runtime.dispatch import attention_implementation, set_config
from linearize_cli.training.distillation import divergence

NONE = "none"  # every layer linear
ROWS = 32  # blocks of text that are measured on


def best(kl: dict[str, float], count: int) -> list[str]:
    """The `count` layers that lower the divergence most when restored, in the model's order."""
    layers = [name for name in kl if name != NONE]
    chosen = sorted(layers, key=kl.__getitem__)[:count]
    return [name for name in layers if name in chosen]


class Restorer:
    """Gives converted layers their softmax attention back.

    Args:
        model: before its conversion, when every layer has the config that it shares with others.
        names: the layers that are going to be converted.
        batch_of: makes the inputs of blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Iterable[str],
        batch_of: Callable[[Blocks | Tensor], Batch] = causal_batch,
    ):
        self.model, self.native, self.batch_of = model, model.config._attn_implementation, batch_of
        with adapted(model):  # which gives a config to modules that have none of their own
            self.shared = {name: model.get_submodule(name).config for name in names}

    @contextmanager
    def restored(self, name: str) -> Iterator[None]:
        """While open, one layer attends by softmax. The config that it shares must be native as well: by that
        the model makes its masks, and linear layers take any, softmax layers only their own.
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
        """Make layers softmax for good, as if they had been kept from the start."""
        record = self.model.config.linearize
        for name in names:
            module = self.model.get_submodule(name)
            del module.linear_attention, record["layers"][name]
            set_config(module, self.shared[name])
            module.config._attn_implementation_internal = self.native
        kept = {*record["softmax"], *names}
        record["softmax"] = [name for name, _ in self.model.named_modules() if name in kept]

    @torch.no_grad()
    def divergences(
        self, model: nn.Module, batches: Sequence[Blocks | Tensor], progress: Callable[[int], None]
    ) -> dict[str, float]:
        """KL(teacher ‖ model), a mean over the tokens of batches: `none` with every layer linear, and under each
        layer's name with that layer alone restored.

        Args:
            model: the converted one, or a sharded copy that shares its configs.
            batches: blocks, or ids `[B, L]`.
            progress: called with the tokens that one of these forwards has read.
        """
        model.eval()
        kl = dict.fromkeys([NONE, *self.shared], 0.0)
        tokens = sum(ids.numel() for ids in batches)
        for ids in batches:
            with attention_implementation(model, self.native):
                teacher = self.logits(model, ids).log_softmax(-1)
            for name in kl:
                with nullcontext() if name == NONE else self.restored(name):
                    kl[name] += divergence(teacher, self.logits(model, ids)).item() * ids.numel() / tokens
                progress(ids.numel())
        return kl

    def logits(self, model: nn.Module, ids: Blocks | Tensor) -> Tensor:
        return model(**self.batch_of(ids).inputs).logits.float()

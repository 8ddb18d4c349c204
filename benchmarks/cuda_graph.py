"""A decoding step as a CUDA graph, so that one launch replaces those of about a thousand kernels."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.dispatch import converted

Replay = Callable[[], object]
WARM = 2  # steps before the capture, in which Triton compiles kernels and libraries allocate workspaces


class Captured:
    """A captured decoding step of one token for every row.

    Each replay uses the same memory for the input, the output and the states.

    Args:
        cache: the cache after the prefix. Each replay updates it in place. Nothing else may change or move it.
        count: `[B]`, the number of tokens of each row so far.
        capture: captures a step and returns its replay function and its output. None captures a CUDA graph.

    Raises:
        ValueError: a layer does not keep its state in place, so the step cannot be replayed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        count: Tensor,
        capture: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] | None = None,
    ):
        other = {type(layer).__name__ for layer in cache.layers if type(layer) is not LinearCacheLayer}
        if other:
            raise ValueError(f"cannot capture a step: the cache of {', '.join(sorted(other))} grows or moves")
        self.layers, self.position = cache.layers, count[:, None].clone()
        self.ids = torch.zeros_like(self.position)
        before = [(layer.state.fork(), layer.seen) for layer in self.layers]

        def step() -> Tensor:
            positions = {"position_ids": self.position}
            return model(input_ids=self.ids, past_key_values=cache, use_cache=True, **positions).logits

        with torch.no_grad():
            step()
            ran = {module.linear_attention.ran for module in converted(model).values()}
            if ran != {"triton"} or not all(layer.owned for layer in self.layers):
                raise ValueError("cannot capture a step: not every layer runs on the Triton kernels")
            self.replay, self.logits = (capture or captured)(step)
            for layer, (state, seen) in zip(self.layers, before, strict=True):
                layer.seen = seen
                for own, kept in zip(vars(layer.state).values(), vars(state).values(), strict=True):
                    own.copy_(kept)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Decode the next tokens `[B, 1]` and return their logits `[B, 1, vocab]`. The next call overwrites them."""
        self.ids.copy_(ids)
        self.replay()
        self.position += 1
        for layer in self.layers:
            layer.seen += 1
        return self.logits


def captured(step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record a step as a CUDA graph, and return its replay function and its output tensor."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out

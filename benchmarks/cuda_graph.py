"""Capture one step of decoding as a CUDA graph, which launches all its kernels at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.dispatch import converted

Replay = Callable[[], object]
WARM = 2  # steps before the capture, in which Triton compiles its kernels and libraries allocate workspaces


class Captured:
    """A step of one token for every row, captured once and replayed. Its tensors keep their addresses.

    Args:
        cache: the cache after a prefix. Each step adds its tokens to it. It must not change in another way.
        count: `[B]` tokens of each row so far.
        capture: returns a function that replays a step, and the output of the step.

    Raises:
        ValueError: a layer does not update its state in place, so the step cannot be replayed.
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
            raise ValueError(f"no graph of a step: the cache grows or moves in {', '.join(sorted(other))}")
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
                raise ValueError("no graph of a step: Triton's kernels do not run in every layer")
            self.replay, self.logits = (capture or captured)(step)
            for layer, (state, seen) in zip(self.layers, before, strict=True):
                layer.seen = seen
                for own, kept in zip(vars(layer.state).values(), vars(state).values(), strict=True):
                    own.copy_(kept)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return logits `[B, 1, vocab]` of the next tokens `[B, 1]`. The next call overwrites them."""
        self.ids.copy_(ids)
        self.replay()
        self.position += 1
        for layer in self.layers:
            layer.seen += 1
        return self.logits


def captured(step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Capture a step as a CUDA graph. Return the function that replays it, and the output of the step."""
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

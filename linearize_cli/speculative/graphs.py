"""One step of decoding as a CUDA graph: one launch in the place of a thousand."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize_cli.runtime.cache import LinearCacheLayer
from linearize_cli.runtime.dispatch import converted

Replay = Callable[[], object]
WARM = 2  # steps before the capture: Triton compiles its kernels, libraries take their workspaces


class Captured:
    """A model's step of one token for every row, replayed where it was captured: its input, its output and the states
    lie where they lay.

    Args:
        cache: after a prefix; it takes in the tokens that are given. It must not be changed otherwise, nor move.
        count: tokens that each row has had.
        capture: makes of a step what replays it, and what the step returned.

    Raises:
        ValueError: a step cannot be replayed, because a layer does not keep its state in place.
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
        """Logits `[B, 1, vocab]` of the tokens `[B, 1]` that come next; the next call overwrites them."""
        self.ids.copy_(ids)
        self.replay()
        self.position += 1
        for layer in self.layers:
            layer.seen += 1
        return self.logits


def captured(step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """A CUDA graph of a step, and its output."""
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

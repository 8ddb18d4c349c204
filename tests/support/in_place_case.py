"""A model whose states Triton's kernels, interpreted, change in place, beside one whose states torch makes anew.

Run as a script, it prints how far logits differ, by what was done, as JSON.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def compared():
    sys.path.append(BENCHMARKS)
    from cuda_graph import Captured
    from families import AUGMENTED, swapped
    from transformers import DynamicCache

    from linearize_cli.models.decoding import forward, pad_left
    from linearize_cli.runtime.dispatch import converted
    from linearize_cli.runtime.tree import read_tree

    torch.manual_seed(0)
    model = swapped("llama", AUGMENTED)
    other = copy.deepcopy(model)
    rows, mask = pad_left([torch.randint(1, 50, (n,)) for n in (17, 5, 9)])
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for one, cache in zip((model, other), caches, strict=True):
        forward(one, rows, cache, mask)
    for module in converted(other).values():
        module.linear_attention.impl = "triton"
    found = {}

    def differ(name, a, b):
        found[name] = max(found.get(name, 0.0), (a - b).abs().max().item())

    def decode(steps, name, step):
        nonlocal mask
        for _ in range(steps):
            ids = torch.randint(1, 50, (3, 1))
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            differ(name, forward(model, ids, caches[0], mask), step(ids))
        assert [layer.seen for layer in caches[0].layers] == [layer.seen for layer in caches[1].layers]

    def accept(*paths):
        nonlocal mask
        ids, parents = torch.randint(1, 50, (3, 7)), [-1, 0, 0, 1, 2, 3, 5]
        trees = [read_tree(x, cache, ids, parents) for x, cache in zip((model, other), caches, strict=True)]
        differ("tree", *(tree.logits for tree in trees))
        for tree in trees:
            tree.commit(*paths)
        stale = False
        try:
            trees[1].commit(*paths)
        except RuntimeError:
            stale = True
        assert stale, "a tree that was committed is not committed again"
        longest = max(map(len, paths))
        pads = [
            [0] * (longest - len(path)) + [1] * len(path)
            for path in (paths * 3 if len(paths) == 1 else paths)
        ]
        mask = torch.cat([mask, torch.tensor(pads)], 1)

    def recorded(step):
        """In the place of a CUDA graph, which writes to where the first output lies and runs no Python."""
        out = step()

        def replay():
            seen = [layer.seen for layer in caches[1].layers]
            out.copy_(step())
            for layer, before in zip(caches[1].layers, seen, strict=True):
                layer.seen = before

        return replay, out

    decode(3, "decoded", lambda ids: forward(other, ids, caches[1], mask))
    held = caches[1].layers[0].state
    decode(6, "decoded", lambda ids: forward(other, ids, caches[1], mask))
    assert caches[1].layers[0].state is held, "a step leaves the state where it is"
    accept([0, 1, 3, 5])
    decode(2, "after a path", lambda ids: forward(other, ids, caches[1], mask))
    accept([0], [0, 2, 4], [0, 1])
    decode(2, "after paths", lambda ids: forward(other, ids, caches[1], mask))
    count = caches[1].layers[0].state.count
    replayed = Captured(other, caches[1], count, capture=recorded)
    decode(5, "captured", replayed)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    with torch.no_grad():
        print(json.dumps(compared()))

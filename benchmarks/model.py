"""Benchmark of a whole Llama with random weights, with softmax and with linear attention, on one device.

    python benchmarks/model.py --context 2k,32k,128k --sequences 1000

- **prefill**: a forward over the context with a cache, and the logits of the last token only.

- **decode**: one token after the context. The lower bound is the time to read the weights once. Softmax decodes with
  the cache of `generate` and with a static cache. The converted model decodes as it is and, if all its kernels update
  the state in place, also as a CUDA graph.

- **tree of N**: verification of a token tree of N nodes after the context, and the commit of a path of half its depth.
  Divided by the time of a decoding step, it is the number of tokens that a speculative step must emit to pay.

- **decode with --sequences N**: one token for N sequences at once, after the longest context.

The default shape is Llama-2-7B's. The results are written as JSON and a Markdown table, named after the machine.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from cuda_graph import Captured
from floors import measure_rates
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from linearize_cli.commands.options import TokenCounts
from linearize_cli.conversion.layer_selection import choose_layers, conversion_record, plan_layers
from linearize_cli.errors import UserError
from linearize_cli.files import write_json
from linearize_cli.hub import brief
from linearize_cli.methods.registry import load_recipe
from linearize_cli.metrics.timing import Run, interleaved, machine
from linearize_cli.models.decoding import forward
from linearize_cli.models.load import check_device
from linearize_cli.runtime import linearize
from linearize_cli.runtime.dispatch import attention_implementation
from linearize_cli.runtime.tree import read_tree
from linearize_cli.versions import versions

SCHEMA = 1
REPEATS, STEPS = 9, 8  # the most repeats, and the decoding steps in each
BRANCHES = 4  # children of a tree's root, each the start of a chain


def build(config: LlamaConfig, method: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a converted model with random weights. `attention_implementation` switches it back to softmax."""
    torch.set_default_dtype(dtype)
    with device:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    recipe = load_recipe(method)
    linear, softmax = choose_layers(plan_layers(model))
    return linearize(model, conversion_record(model, recipe, linear, softmax)).to(device)


def step(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Run:
    """Return a function that runs `STEPS` decoding steps, one token for every row each. All steps read the
    tokens `ids [B, 1]`.
    """

    def run() -> None:
        for _ in range(STEPS):
            forward(model, ids, cache)

    return run


def as_softmax(model: PreTrainedModel, run: Run) -> Run:
    """Return a function that calls `run` with the model switched to softmax attention."""

    def switched() -> None:
        with attention_implementation(model, "sdpa"):
            run()

    return switched


def decoders(model: PreTrainedModel, prefix: Tensor) -> dict[str, Callable[[], Run]]:
    """Return a dict from a way to decode ("linear", "softmax, static cache", ...) to a function that prepares
    it.

    The function prefills a prefix `[1, T]`, and returns a function that decodes `STEPS` tokens after it.
    """
    ids = prefix[:, -1:]

    def linear() -> Run:
        cache = DynamicCache(config=model.config)
        forward(model, prefix, cache, last=True)
        return step(model, cache, ids)

    def graph() -> Run:
        cache = DynamicCache(config=model.config)
        forward(model, prefix, cache, last=True)
        replayed = Captured(model, cache, cache.layers[0].state.count)
        return lambda: [replayed(ids) for _ in range(STEPS)]

    def softmax(static: bool) -> Run:
        with attention_implementation(model, "sdpa"):
            length = prefix.shape[1] + (REPEATS + 2) * STEPS
            cache = (
                StaticCache(config=model.config, max_cache_len=length)
                if static
                else DynamicCache(config=model.config)
            )
            forward(model, prefix, cache, last=True)
        return as_softmax(model, step(model, cache, ids))

    return {
        "linear": linear,
        "linear, CUDA graph": graph,
        "softmax": lambda: softmax(static=False),
        "softmax, static cache": lambda: softmax(static=True),
    }


def tree_of(nodes: int) -> list[int]:
    """Return the parent of each node in a tree of `BRANCHES` chains below one root, -1 for the root."""
    return [-1] + [max(0, i - BRANCHES) for i in range(1, nodes)]


def trees(model: PreTrainedModel, prefix: Tensor, nodes: list[int]) -> dict[str, Callable[[], Run]]:
    """Return a dict from "tree of N" to a function that prepares the verification of a token tree of N nodes.

    The function prefills a prefix `[1, T]`, and returns a function that verifies `STEPS` trees after it and
    commits a path of each.
    """

    def prepare(parents: list[int]) -> Run:
        cache = DynamicCache(config=model.config)
        forward(model, prefix, cache, last=True)
        ids = prefix[:, : len(parents)]

        def run() -> None:
            for _ in range(STEPS):
                tree = read_tree(model, cache, ids, parents)
                path = tree.path(len(parents) - 1)
                tree.commit(path[: (len(path) + 1) // 2])

        return run

    return {f"tree of {count}": partial(prepare, tree_of(count)) for count in nodes}


def many_sequences(model: PreTrainedModel, prefix: Tensor, sequences: int) -> Run:
    """Prefill a prefix `[1, T]`, repeat its cache for many sequences, and return a function that decodes
    `STEPS` tokens of each.
    """
    cache = DynamicCache(config=model.config)
    forward(model, prefix, cache, last=True)
    cache.batch_repeat_interleave(sequences)
    return step(model, cache, prefix[:, -1:].expand(sequences, 1))


@torch.no_grad()
def timed(
    prepared: dict[str, Callable[[], Run]], device: torch.device, budget: float, runs: int
) -> dict[str, float | str]:
    """Time several functions in turn.

    Args:
        prepared: by name, functions that prepare a run and return the function to time.
        budget: seconds for all repeats.
        runs: steps in each run.

    Returns:
        By name, the median seconds of one step, or the reason why the run failed.
    """
    ready: dict[str, Run] = {}
    found: dict[str, float | str] = {}
    for name, prepare in prepared.items():
        try:
            ready[name] = torch.no_grad()(prepare())
            ready[name]()
        except Exception as error:  # out of memory, or no kernels for a graph: reported in the row
            found[name] = brief(error)
            ready.pop(name, None)
    for name, seconds in interleaved(ready, device, REPEATS, budget).items():
        found[name] = median(seconds) / runs
    return {name: found[name] for name in prepared}


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--context",
    type=TokenCounts(),
    default="2k,32k,128k",
    show_default=True,
    metavar="N,N",
    help="Lengths of the prefix in tokens.",
)
@click.option(
    "--nodes",
    type=TokenCounts(),
    default="1,4,16,64",
    show_default=True,
    metavar="N,N",
    help="Nodes of the token trees.",
)
@click.option(
    "--sequences",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Sequences to decode at once. 0 leaves this measurement out.",
)
@click.option("--method", default="augmented", show_default=True, help="Method of the conversion.")
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True, help="Number of layers.")
@click.option("--hidden", type=click.IntRange(1), default=4096, show_default=True, help="Hidden size.")
@click.option(
    "--intermediate", type=click.IntRange(1), default=11008, show_default=True, help="Width of the MLP."
)
@click.option("--heads", type=click.IntRange(1), default=32, show_default=True, help="Heads of a layer.")
@click.option("--vocab", type=click.IntRange(2), default=32000, show_default=True, help="Vocabulary size.")
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights.",
)
@click.option("--device", help="torch device. Default: cuda if there is one, else cpu.")
@click.option(
    "--seconds", type=float, default=10.0, show_default=True, help="Time for all repeats of a measurement."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for the results. Default: benchmarks/results.",
)
def main(device: str | None, dtype: str, seconds: float, out: Path, **asked: Any) -> None:
    """Measure the model in all phases and write the results."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_device(device)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on, number_type = torch.device(device), getattr(torch, dtype)
    config = LlamaConfig(
        vocab_size=asked["vocab"],
        hidden_size=asked["hidden"],
        intermediate_size=asked["intermediate"],
        num_hidden_layers=asked["layers"],
        num_attention_heads=asked["heads"],
        max_position_embeddings=max(asked["context"]) + 1000,
    )
    rates = measure_rates(on, number_type)
    model = build(config, asked["method"], on, number_type)
    weights = sum(p.nbytes for p in model.parameters())
    rows: list[dict[str, Any]] = []

    def measure(phase: str, context: int, batch: int, prepared: dict, runs: int) -> None:
        click.echo(f"{phase}, {context:,} tokens", err=True)
        floor = None if phase == "prefill" else weights / rates.bandwidth
        for form, took in timed(prepared, on, seconds, runs).items():
            known = isinstance(took, float)
            rows.append(
                {
                    "phase": phase,
                    "context": context,
                    "batch": batch,
                    "form": form,
                    "seconds": took if known else None,
                    "floor_seconds": floor,
                    "x_floor": took / floor if known and floor else None,
                    "reason": None if known else took,
                }
            )

    for context in asked["context"]:
        ids = torch.randint(config.vocab_size, (1, context), device=on)

        def prefill(ids: Tensor = ids) -> Run:
            return lambda: forward(model, ids, DynamicCache(config=model.config), last=True)

        forms = {"linear": prefill, "softmax": lambda run=prefill: as_softmax(model, run())}
        measure("prefill", context, 1, forms, 1)
        measure("decode", context, 1, decoders(model, ids), STEPS)
        measure("tree", context, 1, trees(model, ids, asked["nodes"]), STEPS)
    if asked["sequences"]:
        several = {"linear": lambda: many_sequences(model, ids, asked["sequences"])}
        measure("decode", context, asked["sequences"], several, STEPS)
    report = {
        "schema": SCHEMA,
        "machine": machine(on) | {"bytes_per_s": rates.bandwidth, "flops_per_s": rates.peak},
        "versions": versions("triton") | {"cuda": torch.version.cuda},
        "shape": asked | {"dtype": dtype},
        "weight_bytes": weights,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", f"model {report['machine']['gpu'] or report['machine']['cpu']}".lower())
    text = markdown(report)
    (out / f"{name}.md").write_text(text)
    write_json(out / f"{name}.json", report)
    click.echo(text)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    on, shape = report["machine"], report["shape"]
    lines = [
        f"{on['gpu'] or on['cpu']}: {on['bytes_per_s'] / 1e9:,.0f} GB/s copied. "
        f"torch {report['versions']['torch']}. "
        f"`{shape['method']}`, {shape['layers']} layers of {shape['hidden']}, {shape['heads']} heads, "
        f"{shape['dtype']}: {report['weight_bytes'] / 1e9:.2f} GB of weights.",
        "",
        "| phase | context | batch | form | ms | x the time to read the weights |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in report["rows"]:
        took = row["reason"] or f"{row['seconds'] * 1e3:,.2f}"
        ratio = "-" if row["x_floor"] is None else f"{row['x_floor']:.2f}"
        values = (row["phase"], f"{row['context']:,}", str(row["batch"]), row["form"], took, ratio)
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""The printed tables can be read in a terminal of 80 columns: no cell is cut, and no number or name is broken."""

import pytest
from rich.console import Console

from linearize_cli import tables
from linearize_cli.methods.registry import method_names, read_recipe
from linearize_cli.metrics import benchmark

WIDTH = 80


def bench():
    """A report of `bench` on a GPU, with the longest numbers."""
    rows = [
        {
            "phase": phase,
            "batch": batch,
            "context": context,
            "model": model,
            "tokens_per_s": 123_456.7,
            "state_bytes": 123_400_000_000,
            "peak_bytes": 123_400_000_000,
            "reason": None,
        }
        for phase in ("prefill", "decode", "train")
        for batch, context in ((1, 131_072), (128, 4096))
        for model in ("teacher", "student")
    ]
    machine = {"gpu": "NVIDIA H200", "cpu": "AMD EPYC", "threads": 1, "cores": 16}
    return {"rows": rows, "machine": machine, "dtype": "bfloat16"}


def kept():
    names = [f"model.language_model.layers.{n}.self_attn" for n in range(80)]
    return {
        "keep_softmax": {
            "kl": dict.fromkeys(names, 0.1234),
            "repeated_kl": dict.fromkeys(names, 12.34567),
            "kept": names[:2],
        }
    }


def compared():
    labels = {
        "perplexity, x teacher": "1.0275",
        "KV cache replaced, per token": "46.1 kB",
        "eval: pass key at 1,024 (teacher)": "100% (100%)",
        "bench: decode at 131,072, x teacher": "12.34",
    }
    names = ["Llama-2-7b-augmented", "Llama-2-7b-lolcats"]
    return {"artifacts": names, "rows": {k: [v, v] for k, v in labels.items()}, "notes": []}


def recall():
    near = {"distance": 1024, "until": 2048, "teacher": 1.0, "student": 1.0}
    measured = {"teacher": 1.0, "student": 1.0, "by_distance": [near]}
    return {"recall": measured, "passkey": measured}


TABLES = {
    "methods": lambda: tables.method_table([read_recipe(name) for name in method_names()]),
    "bench": lambda: benchmark.render(bench()),
    "kept layers": lambda: tables.kept(kept()),
    "compare": lambda: tables.compared(compared()),
    "recall": lambda: tables.Group(*tables.recall(recall())),
}
WORDS = {
    "methods": [name for name in method_names() if ":" not in name] + ["2510.26692", "delta-channels"],
    "bench": ["131,072", "123,457", "123 GB", "1.00"],
    "kept layers": ["model.language_model.layers.79.self_attn", "12.3457"],
    "compare": ["Llama-2-7b-augmented", "100% (100%)", "bench: decode at 131,072, x teacher"],
    "recall": ["1,024 to 2,047", "100.0%"],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_80_columns(name):
    console = Console(width=WIDTH, markup=False)
    with console.capture() as captured:
        console.print(TABLES[name]())
    shown = captured.get()
    assert max(len(line) for line in shown.splitlines()) <= WIDTH and "…" not in shown
    missing = [word for word in WORDS[name] if word not in shown]
    assert not missing, f"{missing} are broken in:\n{shown}"

"""Transfer a block of layers at a time: what all layers learn at once, in the memory of one block."""

import json
import signal
import subprocess
import sys
from collections import namedtuple
from itertools import groupby
from pathlib import Path

import pytest
import torch
from convert_case import make_teacher, run
from launched import launch
from safetensors.torch import load_file
from tiny_checkpoint import save_tokenizer, tiny_model

from linearize_cli.errors import UserError
from linearize_cli.models.batch import causal_batch
from linearize_cli.training import layerwise_transfer as blocks_module
from linearize_cli.training.streamed_layers import LayerBlocks, output_lengths

SHARE = ("attention.local.size=4", "attention.conv.width=3", "recover.transfer.share=1.0")
LAYERS = 5
GPT2 = dict(n_embd=16, n_layer=LAYERS, n_head=2, n_positions=256)


def blocks(size):
    return dict(overrides=(*SHARE, f"recover.transfer.block_layers={size}"), tokens=16 * 4 * 9)


def spread(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """By name: a teacher, and what of its conversion is not as usual."""
    folder = tmp_path_factory.mktemp("llama")
    llama, gpt2 = make_teacher(folder, LAYERS), tmp_path_factory.mktemp("gpt2")
    model = tiny_model("gpt2", **GPT2)
    spread(model)
    model.save_pretrained(gpt2 / "teacher")
    save_tokenizer(gpt2 / "teacher")
    gpt2 = llama._replace(path=str(gpt2 / "teacher"), folder=gpt2)
    return {"llama": (llama, {}), "gpt2": (gpt2, {}), "hybrid": (llama, dict(keep_softmax="at:1,3"))}


@pytest.fixture(scope="module")
def at_once(teachers):
    made = {}

    def get(name):
        if name not in made:
            teacher, keywords = teachers[name]
            output = teacher.folder / f"{name}-0"
            made[name] = output, run(teacher, output, **keywords, **blocks(0))
        return made[name]

    return get


def weights(output):
    return load_file(output / "model.safetensors")


def curves(output):
    """The loss of every layer at every step."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {
        (record["step"], name): loss
        for record in records
        if record.get("stage") == "transfer"
        for name, loss in record["layers"].items()
    }


@pytest.mark.parametrize(
    "name, size", [("llama", 1), ("llama", 3), ("gpt2", 2), ("hybrid", 1), ("hybrid", 2)]
)
def test_blocks_learn_what_all_layers_learn_at_once(name, size, teachers, at_once):
    teacher, keywords = teachers[name]
    output = teacher.folder / f"{name}-{size}"
    report = run(teacher, output, **keywords, **blocks(size))
    expected, found = weights(at_once(name)[0]), weights(output)
    assert found.keys() == expected.keys()
    linear = [x for x in found if "linear_attention" in x]
    assert linear and all((found[x] - expected[x]).abs().max() < 1e-5 for x in linear)
    assert all(torch.equal(found[x], expected[x]) for x in found.keys() - set(linear))
    assert report["tokens"] == at_once(name)[1]["tokens"]
    assert report["perplexity"]["transferred"] == pytest.approx(at_once(name)[1]["perplexity"]["transferred"])
    by_step, by_step_at_once = curves(output), curves(at_once(name)[0])
    assert by_step.keys() == by_step_at_once.keys() and len(by_step) == 9 * len(report["layers"]["linear"])
    assert all(loss == pytest.approx(by_step_at_once[key], rel=1e-4) for key, loss in by_step.items())


def test_every_linear_layer_has_learned(at_once):
    """So that equal results are not those of no training: the convs start at zero."""
    output, report = at_once("llama")
    convs = [x for name, x in weights(output).items() if name.endswith("linear_attention.conv")]
    assert len(convs) == LAYERS and all(x.abs().max() > 1e-3 for x in convs)


def mapped(tensor):
    """Return True if a tensor is mapped from a file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            return line.endswith(".safetensors")
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the map of a process's memory is Linux's")
@pytest.mark.parametrize("size", [1, 2])
def test_no_more_than_a_block_is_in_memory(size, teachers, monkeypatch):
    counts = []
    hidden_after = blocks_module.hidden_after

    def counting(model, inputs):
        layers = model.model.layers
        frozen = [[p for p in layer.parameters() if not p.requires_grad] for layer in layers]
        here = [not any(map(mapped, some)) for some in frozen]
        assert all(here[i] or all(map(mapped, some)) for i, some in enumerate(frozen)), "half a layer is here"
        counts.append(here)
        return hidden_after(model, inputs)

    monkeypatch.setattr(blocks_module, "hidden_after", counting)
    run(teachers["llama"][0], teachers["llama"][0].folder / f"counted-{size}", **blocks(size))
    expected = [[first <= i < first + size for i in range(LAYERS)] for first in range(0, LAYERS, size)]
    assert [row for row, _ in groupby(counts)] == expected


KILLED = """
import os, signal, sys
import torch; torch.set_num_threads(1)
from linearize_cli.conversion.convert import convert
from linearize_cli.training import layerwise_transfer as blocks
from linearize_cli.training import loop as train
train.SAVE_EVERY = train.SAVE_PAUSE = 0.0
path, text, output, moment, count, *overrides = sys.argv[1:]
def killing(module, name, before):
    function, calls = getattr(module, name), 0
    def call(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == int(count) and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **keywords)
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, call)
killing(*{"save": (train.torch, "save", False), "hidden": (blocks, "save_file", True),
          "drop": (blocks.HiddenStates, "drop", True)}[moment])
convert(path, output, data=(text,), batch_size=4, seq_len=16, tokens=16 * 4 * 9, overrides=tuple(overrides))
"""


@pytest.mark.parametrize(
    "moment, count",
    [
        ("hidden", 50),
        pytest.param("save", 13, marks=pytest.mark.slow),
        pytest.param("drop", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_within_its_block(moment, count, teachers, at_once):
    """Among the training checkpoints of the second block, the hidden states it writes, and as it ends."""
    teacher, _ = teachers["llama"]
    output = teacher.folder / f"killed-{moment}"
    arguments = [teacher.path, teacher.text, str(output), moment, str(count), *blocks(2)["overrides"]]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-800:]
    partial = output.with_name(output.name + ".partial")
    assert not output.exists() and any((partial / "hidden").iterdir())
    run(teacher, output, resume=True, **blocks(2))
    expected, found = weights(at_once("llama")[0]), weights(output)
    assert all((found[x] - expected[x]).abs().max() < 1e-5 for x in expected)
    steps = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [(r["step"], *r["layers"]) for r in steps if r["stage"] == "transfer"]
    assert len(steps) == len(set(steps)) == 9 * 3
    assert not partial.exists()


def test_a_block_that_ends_early_leaves_hidden_states_for_the_next(teachers):
    teacher, _ = teachers["llama"]
    output, keywords = teacher.folder / "early", blocks(2)
    evaluated = (
        "recover.transfer.evaluate=0.1",
        "recover.transfer.early_stop=1",
        "recover.transfer.lr=1e-30",
    )
    report = run(teacher, output, **{**keywords, "overrides": (*keywords["overrides"], *evaluated)})
    steps = [step for step, _ in curves(output)]
    assert sorted(steps) == [1] * LAYERS + [2] * LAYERS  # at such a rate the second look is no better
    assert report["self_check"]


def test_distillation_follows(teachers):
    teacher, _ = teachers["llama"]
    results = []
    for size in (0, 2):
        overrides = (*SHARE[:2], f"recover.transfer.block_layers={size}")
        output = teacher.folder / f"distilled-{size}"
        results.append(run(teacher, output, overrides=overrides, tokens=16 * 4 * 9)["perplexity"])
    assert results[1] == pytest.approx(results[0], rel=1e-5) and results[0]["recovered"]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(teachers, at_once):
    """Each has its rows of every batch, and their hidden states."""
    teacher, _ = teachers["llama"]
    output = teacher.folder / "two-processes"
    settings = [part for override in blocks(2)["overrides"] for part in ("--set", override)]
    sizes = ["--seq-len", "16", "--batch-size", "4", "--tokens", str(16 * 4 * 9)]
    command = ["-m", "linearize_cli", "convert", teacher.path, "-o", output, "--data", teacher.text]
    done = launch(*command, *settings, *sizes)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = weights(at_once("llama")[0]), weights(output)
    assert all((found[x] - expected[x]).abs().max() < 2e-3 for x in expected)
    assert curves(output) == pytest.approx(curves(at_once("llama")[0]), rel=1e-3)


def test_a_layer_that_reads_more_than_hidden_states_is_refused():
    model = tiny_model("llama", num_hidden_layers=3).eval()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + seen.pop(), *args[1:]))
    model.register_forward_pre_hook(lambda module, args: seen.clear())
    found = LayerBlocks.of(model, ["model.layers.1.self_attn"], 1, "cpu")
    assert found.count == 2 and output_lengths(found, model, "sdpa", causal_batch(torch.tensor([[1, 2, 3]])))
    every = LayerBlocks.of(model, [f"model.layers.{i}.self_attn" for i in range(3)], 1, "cpu")
    with pytest.raises(UserError, match="layers 2 to 2 .* cannot run alone"):
        output_lengths(every, model, "sdpa", causal_batch(torch.tensor([[1, 2, 3]])))


def test_layers_in_two_lists_are_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="are not in one list"):
        LayerBlocks.of(model, ["model.layers.0.self_attn", "model.norm"], 1, "cpu")


def test_a_full_disk_is_told_before_the_start(teachers, monkeypatch):
    teacher, _ = teachers["llama"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "linearize_cli.conversion.preflight.shutil.disk_usage", lambda path: usage(1 << 40, 0, 1 << 30)
    )
    wide = {**blocks(1), "tokens": 10**9}
    with pytest.raises(
        UserError, match=r"1024 MB are free, about \d+ MB .*\(122070 MB of them for hidden states"
    ):
        run(teacher, teacher.folder / "full", **wide)
    assert not (teacher.folder / "full.partial").exists()


def test_self_written_text_is_refused(teachers):
    teacher, _ = teachers["llama"]
    with pytest.raises(UserError, match="--data self"):
        run(teacher._replace(text="self"), teacher.folder / "self", **blocks(1))

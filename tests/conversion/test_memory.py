"""Plans of memory: what is in memory at a time, gradient accumulation, and steps that run out of memory."""

import json

import pytest
import torch
from click.testing import CliRunner
from convert_case import SMALL, losses, make_teacher, run
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from linearize_cli import convert
from linearize_cli.cli import cli
from linearize_cli.errors import Notice, UserError
from linearize_cli.models import device
from linearize_cli.terminal import Terminal
from linearize_cli.training import loop

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with the config of a 7B model, and nothing else."""
    folder = tmp_path_factory.mktemp("llama-7b")
    config = CONFIG_MAPPING["llama"](**LLAMA_7B, num_attention_heads=32).to_dict()
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"})
    )
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second, tolerance):
    first, second = weights(first), weights(second)
    return all(torch.allclose(x, second[name], atol=tolerance, rtol=tolerance) for name, x in first.items())


@pytest.fixture
def rows_of_a_step(monkeypatch):
    """Record the number of rows of each forward of training."""
    seen, plain = [], loop.add_gradients

    def add_gradients(compute, optimizer, batch, rows):
        def counted(part):
            seen.append(len(part))
            return compute(part)

        return plain(counted, optimizer, batch, rows)

    monkeypatch.setattr(loop, "add_gradients", add_gradients)
    return seen


def smaller(teacher, plan):
    """The next plan for a memory in which this plan does not fit."""
    arguments = {**SMALL, "data": (teacher.text,), "batch_size": 4, "dry_run": True, "flops": 1e12}
    return convert(teacher.path, **arguments, memory=plan["peak"] - 1)["plan"]


def test_a_smaller_plan_gives_the_same_result(teacher, rows_of_a_step):
    whole = run(teacher, teacher.folder / "whole")
    assert whole["plan"]["rows"] == 4 and set(rows_of_a_step) == {4}
    half = smaller(teacher, whole["plan"])
    assert half["rows"] == 2 and half["peak"] < whole["plan"]["peak"]
    for plan in (half, smaller(teacher, half)):
        rows_of_a_step.clear()
        output = teacher.folder / f"{plan['rows']} rows"
        report = run(teacher, output, memory=plan["peak"])
        assert report["plan"] == {**plan, "memory": plan["peak"]}
        assert set(rows_of_a_step) == {plan["rows"]} and len(rows_of_a_step) == 20 * 4 // plan["rows"]
        assert losses(output) == pytest.approx(losses(teacher.folder / "whole"), rel=1e-4)
        assert same(output, teacher.folder / "whole", 1e-4)
        assert json.loads((output / "linearize.json").read_text())["plan"] == report["plan"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("recover.distill.ce=0.5", "recover.distill.hidden=1"),
        ("recover.separate_documents=true", "recover.distill.ce=1"),
        ("recover.distill.lora=null", "recover.distill.evaluate=0.25", "recover.transfer.evaluate=0.5"),
        ("recover.transfer.block_layers=1", "recover.distill.checkpointing=true"),
    ],
)
def test_the_parts_of_a_step_add_up(teacher, overrides, monkeypatch):
    changes = {"overrides": (*SMALL["overrides"], *overrides), "medusa_heads": 2}
    expected, output = teacher.folder / f"all {overrides[0]}", teacher.folder / f"parts {overrides[0]}"
    run(teacher, expected, **changes)
    monkeypatch.setattr("linearize_cli.conversion.plan.halves", lambda rows: [3])  # 3 rows and 1 row
    assert run(teacher, output, **changes)["plan"]["rows"] == 3
    assert losses(output) == pytest.approx(losses(expected), rel=1e-4)
    assert same(output, expected, 1e-4)
    heads = [load_file(folder / "medusa.safetensors") for folder in (output, expected)]
    assert all(torch.allclose(x, heads[1][name], atol=1e-4) for name, x in heads[0].items())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), None])
def test_a_step_that_runs_out_of_memory_is_repeated(teacher, error, monkeypatch, capsys):
    """The seventh step fails once in its backward. The result is that of a run planned smaller."""
    error = error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    expected = teacher.folder / "planned"
    if not expected.exists():
        monkeypatch.setattr("linearize_cli.conversion.plan.halves", lambda rows: [2])
        run(teacher, expected)
        monkeypatch.undo()
    calls, plain = 0, loop.add_gradients

    def add_gradients(compute, optimizer, batch, rows):
        def failing(part):
            nonlocal calls
            calls += 1
            loss, records = compute(part)
            if calls == 7:
                loss.backward()  # gradients of a failed attempt must not count
                raise error
            return loss, records

        return plain(failing, optimizer, batch, rows)

    monkeypatch.setattr(loop, "add_gradients", add_gradients)
    output = teacher.folder / f"repeated {type(error).__name__}"
    run(teacher, output, terminal=Terminal())
    assert "memory ran out: the step is repeated with 2 rows at a time" in capsys.readouterr().err
    assert losses(output) == pytest.approx(losses(expected), rel=1e-4)
    assert same(output, expected, 1e-4)


def test_one_row_that_does_not_fit_is_an_error(teacher, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(loop, "add_gradients", fail)
    with pytest.raises(UserError, match="memory ran out with 1 rows at a time: CUDA out of memory"):
        run(teacher, teacher.folder / "too large")


@pytest.mark.parametrize(
    "memory, expected",
    [
        ("80G", "8 blocks of 1024 tokens a step; at most"),
        ("48G", "at a time; at most"),
        ("24G", "1 at a time; at most"),
        ("16G", "1 at a time, gradient checkpointing; at most"),
        ("8G", "layers at a time, no distillation"),
    ],
)
def test_a_plan_for_a_device_that_is_not_here(llama, memory, expected):
    arguments = ["convert", str(llama), "--dry-run", "--device", "cuda", "--memory", memory]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "plan: cuda, float16" in result.output and expected in result.output, result.output


def test_keys_that_were_set_by_hand_are_kept(llama):
    common = dict(dry_run=True, device="cuda", flops=1e12, memory=10**10)
    with pytest.raises(UserError, match="the smallest plan takes .* and the memory for it is 10.0 GB"):
        convert(str(llama), overrides=("recover.transfer.share=0.5",), **common)
    common["memory"] = 16 * 10**9
    with pytest.raises(UserError, match="the smallest plan takes"):
        convert(
            str(llama),
            overrides=("recover.distill.checkpointing=false", "recover.transfer.share=0.2"),
            **common,
        )
    common["memory"] = 80 * 10**9
    plan = convert(str(llama), overrides=("recover.distill.checkpointing=true",), **common)["plan"]
    assert plan["checkpointing"] and plan["rows"] == 8


@pytest.mark.parametrize("wrong", ["0", "24", "-1G", "nanG", "manyG", "3.5.2G", "1e99T"])
def test_a_size_that_is_none_is_refused(llama, wrong):
    result = CliRunner().invoke(cli, ["convert", str(llama), "--dry-run", "--memory", wrong])
    assert result.exit_code == 2 and "is not a size such as 24G" in result.output


def test_half_precision_is_used_where_it_is_fast(teacher, monkeypatch):
    """A bf16 checkpoint is converted in fp32 on a CPU that is slow in bf16, and is saved in bf16."""
    model = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.bfloat16)
    path = teacher.folder / "half"
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((teacher.folder / "teacher" / file).read_bytes())
    half = teacher._replace(path=str(path))
    monkeypatch.setattr(device, "slowdown", lambda dtype: 50.0)
    with pytest.warns(Notice, match="computing in float32, because bfloat16 is 50 times slower on this CPU"):
        report = run(half, teacher.folder / "slow half")
    assert report["plan"]["dtype"] == "float32"
    saved = weights(teacher.folder / "slow half")
    kinds = {name: x.dtype for name, x in saved.items()}
    assert (
        kinds["model.embed_tokens.weight"]
        == kinds["model.layers.0.self_attn.q_proj.weight"]
        == torch.bfloat16
    )
    assert {x for name, x in kinds.items() if "linear_attention" in name} == {torch.float32}
    assert report["self_check"]["reload"] < 1e-4
    monkeypatch.setattr(device, "slowdown", lambda dtype: 1.0)
    assert run(half, teacher.folder / "fast half")["plan"]["dtype"] == "bfloat16"


def test_the_device_is_chosen_and_said(teacher, monkeypatch):
    assert device.chosen_device() == device.chosen_device("auto")
    result = CliRunner().invoke(cli, ["inspect", teacher.path])
    assert f"device: {device.chosen_device()}" in result.stderr
    with pytest.raises(UserError, match="The device `nonsense` cannot be used"):
        device.chosen_device("nonsense")

"""Recovery on two processes: DDP as accelerate sets it up, FSDP2, resuming on another number, processes that fail."""

import pytest
import torch
from convert_case import losses, make_teacher
from distributed_case import converted, stopped
from launched import SUPPORT, launch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def case(teacher):
    """One process, two, and shards; runs that one number of processes began and another is to end."""
    where = teacher.path, teacher.text
    whole = converted(*where, teacher.folder / "whole")
    stopped(*where, teacher.folder / "one-to-two", "distill", 5)
    done = launch(SUPPORT / "distributed_case.py", "every", *where, teacher.folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return whole


def same(folder, reference):
    expected, found = losses(reference), losses(folder)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-4
    weights, actual = (load_file(f / "model.safetensors") for f in (reference, folder))
    assert actual.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(actual[name], weights[name], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-to-two"])
def test_two_processes_equal_one(name, case, teacher):
    same(teacher.folder / name, teacher.folder / "whole")


@pytest.mark.parametrize("name", ["two-to-one", "shards-to-one"])
def test_one_process_goes_on_where_two_were_stopped(name, case, teacher):
    assert (teacher.folder / f"{name}.partial" / "checkpoint.pt").exists()
    report = converted(teacher.path, teacher.text, teacher.folder / name, resume=True)
    same(teacher.folder / name, teacher.folder / "whole")
    assert report["perplexity"] == pytest.approx(case["perplexity"], rel=1e-4)


def test_a_killed_process_ends_the_run_which_goes_on(case, teacher):
    ended = launch(SUPPORT / "distributed_case.py", "dying", teacher.path, teacher.text, teacher.folder)
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert told == ["error: another process of this run has ended"]
    assert f"{teacher.folder / 'killed.partial'}: continue with --resume" in ended.stderr
    assert not (teacher.folder / "killed").exists()
    converted(teacher.path, teacher.text, teacher.folder / "killed", resume=True)
    same(teacher.folder / "killed", teacher.folder / "whole")


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(teacher):
    output = teacher.folder / "refused"
    sizes = ["--seq-len", "16", "--batch-size", "3", "--tokens", "2k"]
    arguments = ["convert", teacher.path, "-o", output, "--data", teacher.text, *sizes]
    ended = launch("-m", "linearize_cli", *arguments)
    assert ended.stderr.count("error: --batch-size 3 cannot be divided among 2 processes") == 1
    assert ended.stderr.count("exitcode  : 2 ") >= 1
    assert not output.exists() and not output.with_name("refused.partial").exists()


@pytest.mark.slow
def test_shards_of_a_hybrid_and_of_half_precision(teacher):
    """In bfloat16 what is trained is float32 (asserted where it is sharded), and losses agree within rounding."""
    where, folder = (teacher.path, teacher.text), teacher.folder
    done = launch(SUPPORT / "distributed_case.py", "kept", *where, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    converted(*where, folder / "hybrid", keep_softmax="auto:1")
    same(folder / "shards-hybrid", folder / "hybrid")
    converted(*where, folder / "half-alone", dtype="bfloat16")
    assert losses(folder / "half") == pytest.approx(losses(folder / "half-alone"), rel=0.05)
    weights = load_file(folder / "half" / "model.safetensors")
    assert {weights[name].dtype for name in weights if "linear_attention" in name} == {torch.float32}


@pytest.mark.slow
def test_the_example_configuration_shards(teacher):
    config = ("--config_file", SUPPORT.parents[1] / "examples" / "fsdp2.yaml")
    where = teacher.path, teacher.text, teacher.folder
    ended = launch(SUPPORT / "distributed_case.py", "configured", *where, distribute=config)
    assert ended.returncode == 0, ended.stderr[-2000:]

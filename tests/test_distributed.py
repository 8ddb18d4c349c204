"""Recovery on two processes: DDP as accelerate sets it up, FSDP2, resuming on another number, processes that fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_case import losses, make_teacher
from distributed_case import converted, stopped
from safetensors.torch import load_file

TESTS = Path(__file__).parent


def launch(*arguments, module=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(TESTS),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """One process, two, and shards; runs that one number of processes began and another is to end."""
    teacher = make_teacher(tmp_path_factory.mktemp("convert"))
    where = teacher.path, teacher.text
    whole = converted(*where, teacher.folder / "whole")
    hybrid = converted(*where, teacher.folder / "hybrid", keep_softmax="auto:1")
    stopped(*where, teacher.folder / "one-to-two", "distill", 5)
    done = launch(str(TESTS / "distributed_case.py"), *where, str(teacher.folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return teacher, {"whole": whole, "hybrid": hybrid}


def same(folder, reference):
    expected, found = losses(reference), losses(folder)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-4
    weights, actual = (load_file(f / "model.safetensors") for f in (reference, folder))
    assert actual.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(actual[name], weights[name], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "reference"), [("ddp", "whole"), ("fsdp", "hybrid"), ("one-to-two", "whole")]
)
def test_two_processes_equal_one(name, reference, case):
    teacher, _ = case
    same(teacher.folder / name, teacher.folder / reference)


@pytest.mark.parametrize("name", ["two-to-one", "shards-to-one"])
def test_one_process_goes_on_where_two_were_stopped(name, case):
    teacher, reports = case
    assert (teacher.folder / f"{name}.partial" / "checkpoint.pt").exists()
    report = converted(teacher.path, teacher.text, teacher.folder / name, resume=True)
    same(teacher.folder / name, teacher.folder / "whole")
    assert report["perplexity"] == pytest.approx(reports["whole"]["perplexity"], rel=1e-4)

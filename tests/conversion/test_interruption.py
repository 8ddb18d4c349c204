"""A conversion that is killed or stopped: what it leaves, and that it goes on to the same result."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from convert_case import losses, make_teacher, run
from safetensors.torch import load_file

from linearize_cli.cli import main


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def whole(teacher):
    """A conversion that nothing interrupted."""
    output = teacher.folder / "whole"
    return output, run(teacher, output)


# Runs that are killed, each in a fork of one process that has imported all they need.
RUNS = """
import json, os, signal, sys
import torch; torch.set_num_threads(1)
from pathlib import Path
from convert_case import Teacher, run
from linearize_cli.training import loop as train
train.SAVE_EVERY = train.SAVE_PAUSE = 0.0
path, text, runs = sys.argv[1:]
save, count = train.torch.save, 0
def killing_save(*arguments, **keywords):
    global count
    count += 1
    if moment.startswith("in-save") and count == int(moment.split("-")[-1]):
        arguments[1].write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments, **keywords)
    if moment.startswith("after-save") and count == int(moment.split("-")[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
train.torch.save = killing_save
from linearize_cli.conversion import stages
perplexity, measured = stages.perplexity, 0
def killing_perplexity(*arguments):
    global measured
    measured += 1
    if moment.startswith("in-measure") and measured == int(moment.split("-")[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return perplexity(*arguments)
stages.perplexity = killing_perplexity
from linearize_cli.models import task
divergence, compared = task.divergence, 0
def killing_divergence(*arguments):
    global compared
    compared += 1
    if moment.startswith("in-divergence") and compared == int(moment.split("-")[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return divergence(*arguments)
task.divergence = killing_divergence
for output, moment, keep in json.loads(runs):
    child = os.fork()
    if not child:
        run(Teacher(path, text, None), Path(output), keep_softmax=keep)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, moment
"""
MOMENTS = [
    "in-measure-1",
    "after-save-3",
    "in-save-5",
    "after-save-9",
    "in-measure-4",
    "after-save-14",
    "in-save-21",
]
# Before and while the layers are measured, after the first step that follows, and in the last save.
HYBRID_MOMENTS = ["after-save-9", "in-divergence-8", "after-save-10", "in-save-22"]


@pytest.fixture(scope="module")
def killed(teacher):
    """Kill a conversion at each moment, and return the folders that were to be written, by name."""
    runs = [(f"killed-{moment}", moment, None) for moment in MOMENTS]
    runs += [(f"hybrid-{moment}", moment, "auto:1") for moment in HYBRID_MOMENTS]
    outputs = {name: teacher.folder / name for name, _, _ in runs}
    orders = json.dumps([(str(outputs[name]), *how) for name, *how in runs])
    done = child(RUNS, teacher.path, teacher.text, orders)
    assert done.returncode == 0, done.stderr.decode()[-800:]
    for output in outputs.values():
        assert not output.exists() and output.with_name(output.name + ".partial").is_dir()
    return outputs


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_result(moment, whole, teacher, killed):
    output = killed[f"killed-{moment}"]
    report = run(teacher, output, resume=True)
    expected = losses(whole[0])
    resumed = losses(output)
    assert resumed.keys() == expected.keys()
    assert max(abs(resumed[step] - expected[step]) for step in expected) < 1e-6
    for name, value in whole[1]["perplexity"].items():
        assert report["perplexity"][name] == pytest.approx(value, rel=1e-6)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [(r["stage"], r["step"]) for r in log if "loss" in r]
    assert len(steps) == len(set(steps)), "a step stands in the log twice"


def child(script, *arguments):
    """A process of its own that finds what these tests share."""
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, env=paths)


@pytest.fixture(scope="module")
def hybrid(teacher):
    """A conversion that keeps a layer, and that nothing interrupted."""
    output = teacher.folder / "hybrid"
    return output, run(teacher, output, keep_softmax="auto:1")


@pytest.mark.parametrize("moment", HYBRID_MOMENTS)
def test_a_killed_run_keeps_the_same_layers(moment, hybrid, teacher, killed):
    output = killed[f"hybrid-{moment}"]
    report = run(teacher, output, keep_softmax="auto:1", resume=True)
    for key in ("keep_softmax", "layers", "perplexity", "ablation"):
        assert report[key] == hybrid[1][key], key
    resumed, whole = (load_file(folder / "model.safetensors") for folder in (output, hybrid[0]))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    stages = [json.loads(line)["stage"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert stages.count("keep_softmax") == 1


KILLS = """
import os, random, signal, sys, threading
import torch; torch.set_num_threads(1)
from pathlib import Path
from convert_case import Teacher, run
from linearize_cli.training import loop as train
train.SAVE_EVERY = train.SAVE_PAUSE = 0.0
path, text, output, moments = sys.argv[1:]
chance, schedule = random.Random(moments), train.schedule
for moment in map(int, moments.split(",")):
    delay, partial = chance.uniform(0, 0.03), Path(output + ".partial")
    child = os.fork()
    if not child:
        def arming(step, steps, warmup):
            if step + (24 if steps == 36 else 0) >= moment:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return schedule(step, steps, warmup)
        train.schedule = arming
        run(Teacher(path, text, None), Path(output), resume=partial.exists(), tokens=16 * 4 * 60)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, moment
"""


@pytest.fixture(scope="module")
def long(teacher):
    """24 steps of transfer and 36 of distillation, that nothing interrupted."""
    output = teacher.folder / "long"
    run(teacher, output, tokens=16 * 4 * 60)
    return output


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_no_weight(kills, long, teacher):
    moments = sorted(random.Random(kills).sample(range(50), kills))
    assert moments[0] < 20 and moments[-1] >= 24, "a stage is left out"
    output = teacher.folder / f"killed-{kills}-times"
    arguments = [teacher.path, teacher.text, str(output), ",".join(map(str, moments))]
    done = child(KILLS, *arguments)
    assert done.returncode == 0, done.stderr.decode()[-800:]
    run(teacher, output, tokens=16 * 4 * 60, resume=True)
    resumed, expected = (load_file(folder / "model.safetensors") for folder in (output, long))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert losses(output) == losses(long)


def test_ctrl_c_leaves_only_what_resume_needs(teacher, capsys):
    output = teacher.folder / "stopped"
    arguments = ["convert", teacher.path, "-o", str(output), "--data", teacher.text, "--seq-len", "16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "linearize_cli", *arguments, "--tokens", "50M"],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    log = output.with_name("stopped.partial") / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 3' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"--resume" in errors and b"Traceback" not in errors
    assert not output.exists() and log.parent.is_dir()
    for options, word in ((["--tokens", "50M"], "--resume"), (["--tokens", "40M", "--resume"], "recipe")):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *options])
        assert end.value.code == 2 and word in capsys.readouterr().err

"""One of the processes of `test_distributed`, under torchrun: `distributed_case.py TASK TEACHER TEXT FOLDER`."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from convert_case import SMALL
from torch.distributed.tensor import DTensor

from linearize_cli import cli, convert
from linearize_cli.training import loop as train
from linearize_cli.training.engine import Engine

LOSSES = ("recover.distill.ce=0.5", "recover.distill.hidden=0.5")  # those that divide by what they see
CASE = {**SMALL, "overrides": (*SMALL["overrides"], *LOSSES), "batch_size": 4}
STEPS = {"transfer": 8, "distill": 12}


def converted(path, text, output, **changes):
    return convert(path, output, data=(text,), **{**CASE, **changes})


def stopped(path, text, output, stage, step):
    """A run that is interrupted before a step of a stage."""
    offset = STEPS["transfer"] if stage == "distill" else 0
    schedule, calls = train.schedule, iter(range(1000))

    def stopping(done, steps, warmup):
        if next(calls) == offset + step:
            raise KeyboardInterrupt
        return schedule(done, steps, warmup)

    with (
        patch.multiple(train, schedule=stopping, SAVE_EVERY=0.0, SAVE_PAUSE=0.0),
        suppress(KeyboardInterrupt, SystemExit),  # of two processes, one ends quietly
    ):
        converted(path, text, output)


def shards():
    """While open, runs use FSDP2, as a launcher with `fsdp_config` would have it."""
    return patch.dict(os.environ, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def watched_training(seen):
    """Every parameter must be in shards, and what is trained in float32; notes the stage and the other dtypes."""
    training = Engine.training

    def asserting(self, objective):
        context = training(self, objective)
        enter = type(context).__enter__

        class Asserting:
            def __enter__(_):
                compute, trained = enter(context)
                assert all(isinstance(p, DTensor) for p in trained.parameters())
                assert any(p.to_local().numel() < p.numel() for p in trained.parameters())
                assert all(p.dtype == torch.float32 for p in trained.parameters() if p.requires_grad)
                frozen = {p.dtype for p in trained.parameters() if not p.requires_grad}
                seen.append((type(objective).__name__, torch.bfloat16 in frozen))
                return compute, trained

            def __exit__(_, *error):
                return context.__exit__(*error)

        return Asserting()

    return patch.object(Engine, "training", asserting)


def every(path, text, folder):
    """All that must end as one process does."""
    converted(path, text, folder / "ddp")
    assert dist.get_world_size() == 2
    stopped(path, text, folder / "two-to-one", "distill", 5)
    with shards():
        seen = []
        with watched_training(seen):
            converted(path, text, folder / "fsdp")
        assert seen == [("Transfer", False), ("Distillation", False)]
        converted(path, text, folder / "one-to-two", resume=True)
        stopped(path, text, folder / "shards-to-one", "transfer", 3)


def kept(path, text, folder):
    """Shards with a layer kept as softmax, whole and in half precision."""
    with shards():
        converted(path, text, folder / "shards-hybrid", keep_softmax="auto:1")
        seen = []
        with watched_training(seen):
            converted(path, text, folder / "half", dtype="bfloat16")
        assert seen == [("Transfer", True), ("Distillation", True)]


def dying(path, text, folder):
    """The second process is killed in the seventh step of distillation, as the command runs."""
    schedule, calls = train.schedule, iter(range(1000))

    def killing(done, steps, warmup):
        if next(calls) == STEPS["transfer"] + 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return schedule(done, steps, warmup)

    settings = [part for override in CASE["overrides"] for part in ("--set", override)]
    sizes = ["--seq-len", str(CASE["seq_len"]), "--batch-size", "4", "--tokens", str(CASE["tokens"])]
    with patch.multiple(train, schedule=killing, SAVE_EVERY=0.0, SAVE_PAUSE=0.0):
        cli.main(["convert", path, "-o", str(folder / "killed"), "--data", text, *settings, *sizes, "-q"])


def configured(*where):
    engine = Engine()
    assert engine.processes == 2 and engine.plugin.fsdp_version == 2 and engine.plugin.reshard_after_forward


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"every": every, "dying": dying, "kept": kept, "configured": configured}[sys.argv[1]](
        *sys.argv[2:4], Path(sys.argv[4])
    )

"""A tiny checkpoint with its text, and conversions of it."""

import json
import random
from collections import namedtuple
from contextlib import contextmanager

import pytest
import torch
from tiny_checkpoint import WORDS, save_tokenizer, tiny_model

from linearize_cli import convert
from linearize_cli.methods.registry import method_names
from linearize_cli.training import loop as train
from linearize_cli.training.checkpoint import Checkpoint

# 8 steps of transfer, 12 of distillation.
SIZES = ("attention.local.size=4", "attention.conv.width=3", "recover.transfer.share=0.4")
SMALL = dict(overrides=SIZES, seq_len=16, tokens=16 * 4 * 20)
Teacher = namedtuple("Teacher", "path text folder")
# The augmented methods with every scope, memory and combination. The others differ from these and from their base
# only in a feature map or a score.
AUGMENTED = [f"augmented:{base}" for base in ("flash", "gated-delta", "linformer", "lolcats", "retention")]
# Every method for pytest.mark.parametrize. The other augmented ones are slow.
METHODS = [
    pytest.param(name, marks=[pytest.mark.slow] * (":" in name and name not in AUGMENTED))
    for name in method_names()
]


def make_teacher(folder, layers=2):
    """A random Llama with weights large enough that attention matters, and 200 lines of its words."""
    model = tiny_model(num_hidden_layers=layers, num_key_value_heads=1, max_position_embeddings=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher")
    rng = random.Random(0)
    lines = (" ".join(rng.choices(WORDS[3:], k=30)) for _ in range(200))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Teacher(str(folder / "teacher"), str(folder / "text.jsonl"), folder)


def run(teacher, output, **changes):
    return convert(teacher.path, output, data=(teacher.text,), batch_size=4, **{**SMALL, **changes})


@contextmanager
def stopped(monkeypatch, when):
    """A conversion within saves at every step, and stops after the save that `when(checkpoint, saves)` is true of."""
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(train, "SAVE_PAUSE", 0.0)
    save, count = Checkpoint.save, 0

    def stop(self, path):
        nonlocal count
        count += 1
        save(self, path)
        if when(self, count):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoint, "save", stop)
        yield


def losses(folder):
    """The last record of every step."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(r["stage"], r["step"]): r["loss"] for r in records if "loss" in r}

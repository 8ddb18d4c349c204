"""`bench` on tiny artifacts: what a row says, against plain counts; its refusals; the benchmark of the kernels."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from convert_case import SIZES, make_teacher
from encoders import tiny_model as tiny_encoder
from encoders import tokenizer
from families import tiny_model as tiny_family
from transformers import AutoTokenizer

from linearize_cli import bench, convert, load
from linearize_cli.cli import main
from linearize_cli.errors import UserError
from linearize_cli.metrics import speed, timing
from linearize_cli.metrics.memory import state_bytes
from linearize_cli.models.load import load_teacher

ROOT = Path(__file__).parents[2]
CONTEXTS, BATCHES = (16, 41), (1, 3)
NUMBERS = ("seconds", "tokens_per_s", "peak_bytes", "state_bytes")
ROW = {"model", "phase", "context", "batch", *NUMBERS, "repeats", "reason"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def artifact(teacher):
    folder = teacher.folder / "student"
    convert(teacher.path, folder, train=False, seq_len=16, overrides=SIZES)
    return folder


@pytest.fixture(scope="module")
def report(artifact):
    return bench(artifact, context=CONTEXTS, batch=BATCHES, seconds=0.5)


def rows_of(report, **wanted):
    return [row for row in report["rows"] if all(row[key] == value for key, value in wanted.items())]


def only(report, **wanted):
    (row,) = rows_of(report, **wanted)
    return row


def test_every_model_phase_context_and_batch_has_its_row(report, artifact):
    assert json.loads((artifact / "bench.json").read_text()) == json.loads(
        json.dumps(report, allow_nan=False)
    )
    assert (artifact / "bench.png").read_bytes().startswith(b"\x89PNG") and not list(
        artifact.glob("*.partial")
    )
    assert {"schema", "machine", "rows", "seed", "versions"} <= set(report)
    assert report["machine"]["threads"] == 1 and report["machine"]["gpu"] is None
    keys = [(r["model"], r["phase"], r["context"], r["batch"]) for r in report["rows"]]
    every = product(("teacher", "student"), ("prefill", "decode", "train"), CONTEXTS, BATCHES)
    assert len(keys) == len(set(keys)) and set(keys) == set(every)
    for row in report["rows"]:
        assert set(row) == ROW and row["reason"] is None and row["repeats"] >= 1
        tokens = row["batch"] * (1 if row["phase"] == "decode" else row["context"])
        assert row["tokens_per_s"] == pytest.approx(tokens / row["seconds"])
        assert isinstance(row["peak_bytes"], int)
        assert isinstance(row["state_bytes"], type(None) if row["phase"] == "train" else int)


def test_a_students_state_is_constant_and_its_teachers_grows(report, artifact):
    constant = state_bytes(load(artifact)[0])
    for batch, context in product(BATCHES, CONTEXTS):
        at = dict(phase="prefill", batch=batch, context=context)
        # 2 layers, keys and values, 1 head of 8 numbers, 4 bytes each.
        assert only(report, model="teacher", **at)["state_bytes"] == batch * context * 2 * 2 * 8 * 4
        assert only(report, model="student", **at)["state_bytes"] == batch * constant
    decoded = {r["state_bytes"] for r in rows_of(report, model="student", phase="decode", batch=1)}
    assert decoded == {constant}


def test_peaks_hold_what_must_be_there(report, artifact, teacher):
    models = {"teacher": load_teacher(teacher.path)[0], "student": load(artifact)[0]}
    weights = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    for row in report["rows"]:
        own = weights[row["model"]]
        kept = {
            "prefill": row["state_bytes"],
            "decode": row["state_bytes"] and row["state_bytes"] // 2,
            "train": own,
        }
        assert row["peak_bytes"] > own + kept[row["phase"]], "gradients are as large as weights"
    for name, batch in product(models, BATCHES):
        short, long = (
            only(report, model=name, phase="train", batch=batch, context=n)["peak_bytes"] for n in CONTEXTS
        )
        assert long > short


def test_kept_layers_grow_alone(teacher):
    folder = teacher.folder / "hybrid"
    convert(teacher.path, folder, train=False, seq_len=16, overrides=SIZES, keep_softmax="at:1")
    report = bench(folder, context=(16, 32), seconds=0, write=False)
    short, long = (only(report, model="student", phase="prefill", context=n)["state_bytes"] for n in (16, 32))
    assert long - short == 16 * 2 * 8 * 4, "keys and values of one layer"
    assert not (folder / "bench.json").exists() and not (folder / "bench.png").exists()


def test_contexts_of_ones_own_choice_reach_as_far_as_time_allows(artifact):
    report = bench(artifact, seconds=0, write=False)
    assert sorted({row["context"] for row in report["rows"]}) == [16, 32, 64, 128]
    assert {row["context"] for row in report["rows"] if row["seconds"]} == {16}
    assert all(row["repeats"] == 1 for row in report["rows"] if row["seconds"])
    late = only(report, model="student", phase="train", context=128)
    assert "--context 128" in late["reason"] and not any(late[key] for key in NUMBERS)


def test_positions_that_end_give_nulls(teacher, tmp_path, capsys):
    tiny_family("gpt2", vocab_size=6, bos_token_id=1, eos_token_id=2, n_layer=2).save_pretrained(
        tmp_path / "gpt2"
    )
    AutoTokenizer.from_pretrained(teacher.path).save_pretrained(tmp_path / "gpt2")
    convert(str(tmp_path / "gpt2"), tmp_path / "out", train=False, overrides=("attention.local.size=4",))
    report = bench(tmp_path / "out", context=(256, 257), seconds=0)
    assert all(row["seconds"] > 0 for row in rows_of(report, context=256)), "all positions, decoded too"
    for row in rows_of(report, context=257):
        assert "256 positions" in row["reason"] and [row[key] for key in NUMBERS] == [None] * 4


def test_no_memory_gives_nulls_to_the_model_that_has_none(artifact, monkeypatch):
    train = speed.PHASES["train"]

    def scarce(task, model, ids):
        if type(model).__name__.startswith("Linearized"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(task, model, ids)

    monkeypatch.setitem(speed.PHASES, "train", scarce)
    report = bench(artifact, context=(16,), seconds=0, write=False)
    assert only(report, model="student", phase="train")["reason"] == "out of memory"
    assert only(report, model="teacher", phase="train")["seconds"] > 0
    monkeypatch.setitem(speed.PHASES, "train", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        bench(artifact, context=(16,), seconds=0, write=False)


@pytest.mark.parametrize(
    ("family", "decodes"), [("bert", False), ("roberta-classifier", False), ("t5", True)]
)
def test_other_kinds_of_models(family, decodes, tmp_path):
    tiny_encoder(family).save_pretrained(tmp_path / family)
    tokenizer(sentinels=family == "t5").save_pretrained(tmp_path / family)
    overrides = ("attention.local.size=4", "attention.conv.width=3")
    convert(str(tmp_path / family), tmp_path / "out", train=False, seq_len=32, overrides=overrides)
    report = bench(tmp_path / "out", context=(32, 140), seconds=0)
    phases = {row["phase"] for row in report["rows"]}
    assert phases == ({"prefill", "decode", "train"} if decodes else {"prefill", "train"})
    assert all(row["seconds"] > 0 for row in rows_of(report, context=32))
    assert all((row["seconds"] is None) == (family != "t5") for row in rows_of(report, context=140))
    cached = {row["state_bytes"] is not None for row in rows_of(report, phase="prefill", context=32)}
    assert cached == {decodes}


def run_command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *map(str, arguments)])
    return ended.value.code or 0


def test_command_line(artifact, tmp_path, capfd):
    files = ("--plot", tmp_path / "p.png", "--json", tmp_path / "r.json")
    assert run_command(artifact, "--context", "16,0.04k", "--batch", "2", *files, "-q") == 0
    said = capfd.readouterr()
    assert said.err == ""
    report = json.loads((artifact / "bench.json").read_text())
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in said.out.splitlines()]
    for phase, context in product(("prefill", "decode", "train"), (16, 40)):
        speeds = [
            only(report, model=name, phase=phase, context=context)["tokens_per_s"]
            for name in ("teacher", "student")
        ]
        line, memory = (line for line in lines if line[:3] == [phase, "2", str(context)])
        assert len(memory) > 6 and line[5] == f"{speeds[1] / speeds[0]:.2f}"


def test_chosen_phases_alone_are_measured_and_told_as_they_come(artifact, tmp_path, capsys):
    phases = ("--phase", "prefill", "--phase", "decode")
    assert run_command(artifact, "--context", "16", *phases, "--json", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["phase"] for row in report["rows"]] == ["prefill"] * 2 + ["decode"] * 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said if "batch 1" in line] == ["prefill", "decode"]
    assert sum(line.endswith("x teacher") for line in said) == 2


def test_bad_input_is_refused(artifact, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file()}
    cases = [
        ((artifact, "--context", "16,x"), "'x' should be a number of tokens"),
        ((artifact, "--context", "16,7"), "--context 7 is too short"),
        ((artifact, "--phase", "encode"), "'encode' is not one of"),
        ((artifact, "--batch", "2,0"), "not a list of whole numbers"),
        ((artifact, "--context", "8", "--batch", 10**15), "not enough memory for"),
        ((artifact, "--plot", tmp_path / "none" / "p.png"), "--plot"),
        ((artifact, "--plot", tmp_path / "p.pdf"), "is not a PNG file"),
        ((artifact, "--json", tmp_path), "is a folder"),
        ((artifact, "--teacher", "demo"), "another vocabulary"),
        ((artifact, "--teacher", artifact), "already a linearized model"),
        ((artifact, "--device", "abacus"), "abacus"),
        ((tmp_path,), "is not a linearized artifact"),
    ]
    for arguments, words in cases:
        assert run_command(*arguments) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="--batch"):
        bench(artifact, batch=())
    assert before == {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file()}


def test_an_interruption_leaves_what_was_there(artifact, monkeypatch, capsys):
    before = {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(speed.PHASES, "decode", interrupted)
    assert run_command(artifact, "--context", "16") == 130
    assert before == {file.name: file.read_bytes() for file in artifact.iterdir() if file.is_file()}


def test_ways_take_turns_within_the_budget():
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    found = timing.interleaved(ways, "cpu", 3, budget=60.0)
    assert "".join(called) == "ababab" and [len(x) for x in found.values()] == [3, 3]
    called.clear()
    timing.interleaved(ways, "cpu", 3, budget=0.0)
    assert "".join(called) == "ab"


def test_peak_is_the_most_at_a_time():
    size = 1000 * 4

    def run(held):
        held.clear()  # 2 less
        first = torch.ones(1000)
        del first
        return torch.ones(3000) + 1  # 2 of 3

    _, peak = timing.peak_bytes(lambda: [torch.ones(2000)], run, "cpu")
    assert 4 * size <= peak < 4 * size + 1000


def test_the_floors_count_what_their_forms_do(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import floors

    sizes = floors.Sizes(batch=2, heads=3, tokens=7, dim=5, dtype=torch.bfloat16)
    pairs = sum(i + 1 for i in range(7))
    forward = floors.softmax_work(sizes, floors.FORWARD)
    assert forward == (2 * 3 * pairs * (2 * 5 + 2 * 5), 4 * 2 * 3 * 7 * 5 * 2)
    assert floors.softmax_work(sizes, floors.DECODE).bytes == (4 + 2 * 7) * 2 * 3 * 5 * 2
    for scope, edge in (("sliding", lambda i: max(0, i - 2)), ("group", lambda i: i - i % 3)):
        seen = [i - edge(i) + 1 for i in range(8)]
        assert floors.local_tokens(scope, 3, 7, floors.FORWARD) == pytest.approx(sum(seen[:7]) / 7)
        assert floors.local_tokens(scope, 3, 7, floors.DECODE) == seen[7]


def test_the_benchmark_of_the_kernels_runs(tmp_path):
    script = ROOT / "benchmarks" / "attention.py"
    options = ["--context", "130", "--heads", "2", "--head-dim", "16", "--seconds", "0", "--device", "cpu"]
    command = [sys.executable, str(script), *options, "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text() and report["machine"]["threads"] == 1
    assert file.with_suffix(".md").read_text() in result.stdout + "\n"
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(report["rows"]) == 3 * 3
    for row in report["rows"]:
        assert row["reason"] is None and row["seconds"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_seconds"] / row["seconds"])
        softmax = only(report, form="sdpa", phase=row["phase"], context=row["context"])
        assert row["x_sdpa"] == pytest.approx(softmax["seconds"] / row["seconds"])


def test_the_check_of_a_gpu_is_rehearsed(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu_check.py", "--rehearse", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 0 and all(step["ended"] == "passed" for step in summary.values()), summary
    assert list(summary) == ["imports", "correctness", "attention", "model"]
    assert {f"{name}.txt" for name in summary} <= {path.name for path in tmp_path.iterdir()}


def test_the_benchmark_of_a_whole_model_runs(tmp_path):
    script = ROOT / "benchmarks" / "model.py"
    shape = dict(layers=2, hidden=32, intermediate=48, heads=2, vocab=50, dtype="float32", device="cpu")
    shape |= dict(context=90, nodes="1,5", sequences=3, seconds=0, out=tmp_path)
    options = [f"--{name}={value}" for name, value in shape.items()]
    result = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert file.with_suffix(".md").read_text() in result.stdout + "\n"
    assert [(row["phase"], row["form"]) for row in rows] == [
        *(("prefill", form) for form in ("linear", "softmax")),
        *(("decode", form) for form in ("linear", "linear, CUDA graph", "softmax", "softmax, static cache")),
        *(("tree", form) for form in ("tree of 1", "tree of 5")),
        ("decode", "linear"),
    ]
    for row in rows:
        assert (
            (row["seconds"] is None) == (row["form"] == "linear, CUDA graph") == (row["reason"] is not None)
        )

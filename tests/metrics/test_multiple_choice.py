"""examples/multiple_choice.py: questions whose answer is known."""

import runpy
from pathlib import Path

import yaml
from click.testing import CliRunner

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/multiple_choice.py"))


def test_each_question_has_its_own_continuation_among_those_of_others():
    words = [f"w{i}" for i in range(1003)]
    rows = EXAMPLE["sample_questions"](words, questions=40, passage=13, continuation=4, seed=3)
    assert len(rows) == 40 and len({row["label"] for row in rows}) == 4
    for row in rows:
        last = int(row["passage"].split()[-1][1:])
        assert row["choices"][row["label"]] == "".join(f" w{last + i}" for i in range(1, 5))
        assert len(set(row["choices"])) == 4


def test_the_task_is_written_or_the_text_is_too_short(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "task"
    text.write_text("word " * 999)
    command = [str(text), "--out", str(out), "--passage", "20", "--continuation", "5"]
    assert CliRunner().invoke(EXAMPLE["main"], command).output.startswith("39 questions")
    task = yaml.safe_load((out / "next-passage.yaml").read_text())
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().count("\n") == 39
    said = CliRunner().invoke(EXAMPLE["main"], [str(text), "--out", str(tmp_path / "no"), "--passage", "500"])
    assert said.exit_code == 1 and "too short" in said.output and not (tmp_path / "no").exists()

"""`report` and `compare`: the numbers are those of the reports, the page is complete, and damage is named."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from convert_case import make_teacher, run

from linearize_cli.artifact.contents import foreign_files
from linearize_cli.artifact.record import summed
from linearize_cli.cli import main
from linearize_cli.errors import UserError
from linearize_cli.metrics.benchmark import bench
from linearize_cli.metrics.evaluation import evaluate
from linearize_cli.pages.compare import compare, in_order
from linearize_cli.pages.page import compared_texts, report
from linearize_cli.verification.verify import verify

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny artifact with the reports of all commands."""
    teacher = make_teacher(tmp_path_factory.mktemp("report"))
    folder = teacher.folder / "measured"
    run(teacher, folder, train=False, keep_softmax="at:1")
    evaluate(folder, data=teacher.text, tokens=2048)
    bench(folder, context=[64, 128], seconds=0.01)
    verify(folder, quick=True)
    return folder


@pytest.fixture
def artifact(made, tmp_path):
    return shutil.copytree(made, tmp_path / "measured")


class Page(HTMLParser):
    """The text of a page, its elements, and the attributes that could load something."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.links, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(summed(data)))


def test_the_page_shows_what_was_measured(artifact):
    result = report(artifact)
    assert result == {"output": str(artifact / "report.html"), "missing": []}
    page = Page((artifact / "report.html").read_text())
    record, found, checks = (
        json.loads((artifact / f"{name}.json").read_text()) for name in ("linearize", "eval", "verify")
    )
    assert f"{record['perplexity']['swapped']:,.3f}" in page.text
    assert f"{found['kl']:.4f}" in page.text and f"{found['top1_agreement']:.1%}" in page.text
    assert checks["verdict"] in page.text
    assert all(line["measured"] in page.text for line in checks["checks"])
    rows = json.loads((artifact / "bench.json").read_text())["rows"]
    assert all(f"{row['tokens_per_s']:,.0f}" in page.text for row in rows if row["tokens_per_s"])
    for sample in found["generation"]["samples"]:
        assert sample["prompt"] in page.text and sample["student"][-9:].split()[-1] in page.text
    assert "1 layers" not in page.text and "Not measured" not in page.text
    assert not list(foreign_files(artifact))


def test_the_page_needs_no_other_file_and_runs_no_code(artifact):
    edit(artifact / "eval.json", lambda data: data["generation"]["samples"][0].update(student=HOSTILE))
    edit(artifact / "eval.json", lambda data: data.update(data=HOSTILE))
    edit(artifact / "linearize.json", lambda data: data.update(command=HOSTILE))
    edit(artifact / "bench.json", lambda data: data["rows"][0].update(phase=f'\\q">{HOSTILE}'))
    report(artifact)
    page = Page((artifact / "report.html").read_text())
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 4
    assert all(link.startswith("#") for link in page.links)
    assert page.tags.count("svg") >= 4


def test_the_page_says_what_is_missing(artifact):
    for name in ("eval", "bench", "verify"):
        (artifact / f"{name}.json").unlink()
    assert report(artifact)["missing"] == ["eval", "bench", "verify"]
    text = Page((artifact / "report.html").read_text()).text
    assert all(f"Run linearize {name} {artifact}" in text for name in ("eval", "bench", "verify"))


@pytest.mark.parametrize("name", ["eval", "bench", "verify"])
@pytest.mark.parametrize("contents", [{}, {"rows": [1]}, {"perplexity": 3, "data": 1}, []])
def test_a_damaged_report_is_named(artifact, name, contents):
    (artifact / f"{name}.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=f"{name}.json"):
        report(artifact)
    assert not (artifact / "report.html").exists()


@pytest.mark.parametrize("name", ["linearize", "eval", "bench", "verify"])
def test_a_report_that_was_changed_is_refused(artifact, name):
    data = json.loads((artifact / f"{name}.json").read_text())
    (artifact / f"{name}.json").write_text(json.dumps(data | {"seed": 5, "command": "mine"}))
    for action in (report, lambda one: compare([one, one])):
        with pytest.raises(UserError, match=f"{name}.json"):
            action(artifact)


def test_an_artifact_whose_weights_have_changed_has_no_page(artifact):
    data = bytearray((artifact / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (artifact / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="changed: model.safetensors"):
        report(artifact)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("verify", lambda data: data.update(checks=[{"name": "a"}])),
        ("linearize", lambda data: data.update(keep_softmax={"kept": 5, "kl": {"a": "b"}})),
        ("eval", lambda data: data.update(embeddings=[{"context": 8, "distance": 0.5, "blocks": 3}])),
    ],
)
def test_a_report_in_another_form_is_named(artifact, name, change):
    edit(artifact / f"{name}.json", change)
    with pytest.raises(UserError, match="is damaged"):
        report(artifact)


@pytest.mark.parametrize("command", [["report"], ["compare", "-o", "page.html"]])
def test_the_result_as_json_does_not_replace_another_file(artifact, tmp_path, command, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [
        *(artifact / name for name in ("linearize.json", "model.safetensors", "report.html")),
        "page.html",
    ]
    for file in files[: 2 + len(command)]:
        with pytest.raises(SystemExit) as exit:
            main([*command, str(artifact), *[str(artifact)] * (len(command) > 1), "--json", str(file)])
        assert exit.value.code == 2 and "--json" in capsys.readouterr().err


def test_the_difference_of_two_texts_begins_at_a_word():
    found = compared_texts({"prompt": "p", "teacher": "a they b", "student": "a the b"})
    assert (found["shared"], found["teacher"], found["student"]) == ("a ", "they b", "the b")


@pytest.mark.parametrize("name", ["config.json", "page", "folder.html"])
def test_a_page_replaces_nothing_but_a_page(artifact, name, capsys):
    (artifact / "folder.html").mkdir()
    before = (artifact / "config.json").read_bytes()
    for command in (["report", str(artifact)], ["compare", str(artifact), str(artifact)]):
        with pytest.raises(SystemExit) as exit:
            main([*command, "-o", str(artifact / name)])
        assert exit.value.code == 2 and name in capsys.readouterr().err
    assert (artifact / "config.json").read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_no_part_of_the_page_is_wider_than_the_window(artifact, width):
    """Chromium's window is at least 500 pixels wide. A frame of 390 pixels has the width of a phone."""
    report(artifact)
    wide = 390 if width == 500 else width
    frame = artifact.parent / "frame.html"
    frame.write_text(
        f"<iframe id=f src='measured/report.html' style='width:{wide}px;height:900px;border:0'></iframe>"
        "<script>onload=()=>{const d=document.getElementById('f').contentDocument.documentElement;"
        "document.title=d.scrollWidth+' of '+d.clientWidth}</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--allow-file-access-from-files", "--dump-dom"]
    command += [f"--window-size={width},900", f"file://{frame}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    needed, had = map(int, re.search(r"<title>(\d+) of (\d+)", found).groups())
    assert needed <= had


def test_compare_puts_the_numbers_side_by_side(artifact, tmp_path, capsys):
    other = shutil.copytree(artifact, tmp_path / "other")
    edit(other / "eval.json", lambda data: data.update(kl=0.5, data="another.txt"))
    (other / "bench.json").unlink()
    result = compare([artifact, other])
    assert result["artifacts"] == ["measured", "other"]
    assert result["rows"]["eval: KL, nats"][1] == "0.5000"
    assert result["rows"]["perplexity"][0] == result["rows"]["perplexity"][1]
    assert [values[1] for label, values in result["rows"].items() if "bench" in label] == [None] * 6
    assert len(result["notes"]) == 1 and "another.txt" in result["notes"][0]
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as exit:
        main(["compare", str(artifact), str(other), "-o", str(page)])
    shown, written = capsys.readouterr().out, Page(page.read_text()).text
    assert not exit.value.code
    for label, values in result["rows"].items():
        assert label in shown and label in written
        assert all((value or "-") in shown and (value or "-") in written for value in values)


def test_artifacts_with_the_same_name_are_told_apart(artifact, tmp_path):
    (tmp_path / "b").mkdir()
    other = shutil.copytree(artifact, tmp_path / "b" / artifact.name)
    assert compare([artifact, other])["artifacts"] == [f"{tmp_path.name}/measured", "b/measured"]


def test_labels_keep_their_order():
    found = in_order([{"a": "", "c": "", "z": ""}, {"a": "", "b": "", "c": "", "d": ""}, {"y": "", "a": ""}])
    assert found == ["y", "a", "b", "c", "d", "z"]


@pytest.mark.parametrize("arguments", [["one"], []])
def test_one_artifact_is_not_compared(made, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["compare", *(str(made) for _ in arguments)])
    assert exit.value.code == 2

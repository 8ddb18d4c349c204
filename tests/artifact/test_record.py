"""`linearize.json` and the `linearize` part of `config.json` are checked field by field, in every command."""

import json

import pytest
from convert_case import make_teacher, run
from tiny_checkpoint import edit_json

from linearize_cli import cli
from linearize_cli.artifact.record import FIELDS, read_config, read_record
from linearize_cli.errors import UserError

ODD = (3, "x", [1], {"a": [1]}, True, "a\0b", 10**30, float("nan"))
# Values that fit where they stand.
FIT = {
    3: ("schema", "seq_len", "state_bytes", "kv_bytes_per_token"),
    "x": ("base_model", "method", "task", "card", "command", "sum"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("record"))


@pytest.fixture(scope="module")
def artifact(teacher):
    folder = teacher.folder / "artifact"
    run(teacher, folder, train=False)
    return folder


@pytest.fixture
def report(artifact):
    """The report, which is put back."""
    path = artifact / "linearize.json"
    before = path.read_text()
    yield path
    path.write_text(before)


def test_a_whole_report_is_read(artifact):
    assert read_record(artifact, whole=True) == json.loads((artifact / "linearize.json").read_text())
    assert read_record(artifact / "nowhere") == {}


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_of_the_wrong_type_is_named(key, artifact, report):
    for value in ODD[:5] if key not in ("medusa", "fingerprint", "origin") else ODD[:3]:
        if isinstance(value, int | str) and key in FIT.get(value, ()):
            continue
        edit_json(report, **{key: value})
        with pytest.raises(UserError, match=f"linearize.json is not a report of a conversion: {key} is"):
            read_record(artifact)
        report.write_text(json.dumps(json.loads(report.read_text()) | {key: None}))
        read_record(artifact)


@pytest.mark.parametrize(("key", "value"), [("base_model", "a\0b"), ("seq_len", 0), ("seq_len", 10**30)])
def test_a_value_that_nothing_can_use(key, value, artifact, report):
    edit_json(report, **{key: value})
    with pytest.raises(UserError, match=key):
        read_record(artifact)


def test_what_a_report_lacks_is_named(artifact, report):
    edit_json(report, perplexity=None, method=None)
    read_record(artifact)
    with pytest.raises(UserError, match="lacks method, perplexity"):
        read_record(artifact, whole=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "{}", "--data", "{text}"],
        ["bench", "{}"],
        ["verify", "{}", "--target", "teacher"],
        ["push", "{}", "owner/name", "--dry-run"],
        ["heads", "{}", "--tokens", "64"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_reads_it_refuses_it(arguments, artifact, report, teacher, capsys):
    edit_json(report, base_model=["x"], perplexity=3)
    with pytest.raises(SystemExit) as end:
        cli.main([argument.format(artifact, text=teacher.text) for argument in arguments])
    message = capsys.readouterr().err
    assert end.value.code == 2 and "base_model is ['x']" in message and "perplexity is 3" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"linearize": []}, "linearize is not an object"),
        ({"auto_map": [1]}, "auto_map"),
        ({"auto_map": {"AutoConfig": 3}}, "auto_map"),
        ({"linearize": {}}, "lacks"),
        ({"attention": {"local": 3}}, "linearize.attention.local"),
        ({"attention": {"far": {"feature_dim": "x"}}}, "linearize.attention.far.feature_dim"),
        ({"layers": {"model.layers.0.self_attn": {"heads": "x"}}}, "layers"),
        ({"layers": {"model.layers.0.self_attn": None}}, "heads"),
        ({"softmax": "x"}, "softmax"),
        ({"base_class": None}, "base_class"),
    ],
    ids=str,
)
def test_a_config_that_no_conversion_wrote(change, said, artifact, capsys):
    path = artifact / "config.json"
    before = json.loads(path.read_text())
    inner = {key: value for key, value in change.items() if key in before["linearize"]}
    changed = before | {"linearize": before["linearize"] | inner} if inner else before | change
    path.write_text(json.dumps(changed))
    try:
        with pytest.raises(UserError, match="config.json is not the config of a converted model") as refused:
            read_config(artifact)
        assert said in str(refused.value)
        for arguments in (
            ["generate", str(artifact), "a"],
            ["verify", str(artifact)],
            ["inspect", str(artifact)],
        ):
            with pytest.raises(SystemExit) as end:
                cli.main(arguments)
            assert end.value.code == 2 and "config.json" in capsys.readouterr().err
    finally:
        path.write_text(json.dumps(before))

"""`--tracker`: what the trackers get, and what happens without one's package."""

import json

import pytest
from accelerate.tracking import GeneralTracker
from convert_case import make_teacher, run

from linearize_cli import cli
from linearize_cli.errors import UserError
from linearize_cli.training import engine


class Notebook(GeneralTracker):
    name, requires_logging_directory = "notebook", False

    def __init__(self):
        super().__init__()
        self.settings, self.pages, self.closed = {}, [], False

    @property
    def tracker(self):
        return self

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        self.pages.append((step, values))

    def finish(self):
        self.closed = True


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("convert"))


def test_a_tracker_gets_every_step_and_measure(teacher):
    notebook = Notebook()
    run(teacher, teacher.folder / "noted", tracker=(notebook,))
    log = [json.loads(line) for line in (teacher.folder / "noted" / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if "step" in record]
    told = {step: values for step, values in notebook.pages if any("/loss" in key for key in values)}
    assert sorted(told) == list(range(1, len(steps) + 1)) and notebook.closed
    for number, record in enumerate(steps, 1):
        stage = record["stage"]
        assert told[number][f"{stage}/loss"] == record["loss"]
        assert told[number][f"{stage}/lr"] == record["lr"]
        assert told[number][f"{stage}/tokens_per_s"] == record["tokens_per_s"]
        layers = {f"transfer/layers/{layer}": loss for layer, loss in record.get("layers", {}).items()}
        assert layers.items() <= told[number].items() and bool(layers) == (stage == "transfer")
    measured = {
        key: value for _, values in notebook.pages for key, value in values.items() if "measure" in key
    }
    assert {"measure/transferred/perplexity", "measure/recovered/perplexity"} <= measured.keys()
    assert notebook.settings["recipe/attention/local/size"] == "4"


def test_tensorboard(teacher):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(teacher, teacher.folder / "drawn", tracker=("tensorboard",))
    events = EventAccumulator(str(teacher.folder / "runs" / "drawn")).Reload()
    assert {"transfer/loss", "distill/loss", "distill/lr"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("distill/loss")] == list(range(9, 21))


@pytest.mark.parametrize(("name", "hint"), [("wandb", "pip install wandb"), ("paper", "accelerate has")])
def test_a_tracker_that_is_not_there(name, hint, teacher, monkeypatch, capsys):
    monkeypatch.setattr(engine, "get_available_trackers", lambda: [])
    arguments = [
        "convert",
        teacher.path,
        "-o",
        str(teacher.folder / "none"),
        "--tracker",
        f"{name},tensorboard",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and f"--tracker {name}: " in told and hint in told
    assert not list(teacher.folder.glob("none*"))


def test_a_tracker_that_refuses_ends_the_run(teacher):
    class Refusing(Notebook):
        def start(self):
            raise OSError("no account")

    with pytest.raises(UserError, match="no account"):
        run(teacher, teacher.folder / "refused", tracker=(Refusing(),))
    assert not list(teacher.folder.glob("refused*"))

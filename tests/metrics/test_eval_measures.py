"""Recall by distance and generation checks, on models whose answers are known."""

from types import SimpleNamespace

import encoders
import pytest
import torch
from families import swapped, tiny_model
from torch.nn.functional import one_hot
from transformers import GenerationConfig

from linearize_cli.demo import teacher_path
from linearize_cli.metrics import plots, synthetic
from linearize_cli.metrics.generation import agreed, continued, generation, greedy, repetition, sampling
from linearize_cli.models.tasks import CausalLM

VOCABULARY = 2000


class Copier:
    """Predicts the token that stood so many tokens before the one it predicts."""

    device, training = torch.device("cpu"), False
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def __init__(self, distance):
        self.distance = distance

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=one_hot(input_ids.roll(self.distance - 1, 1), VOCABULARY).float())


@pytest.fixture(scope="module")
def numbers():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_path())


def chance():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("distance", [8, 33, 100])
def test_pairs_are_told_once_and_at_their_distance(distance):
    probe = synthetic.pair_probe(torch.arange(5, 50), [1], distance, chance())
    key, value = probe.rows[:, 1], probe.rows[:, 2]
    assert probe.rows.shape == (synthetic.ROWS, distance + 3) and (probe.rows[:, 0] == 1).all()
    assert (probe.rows[:, -2] == key).all() and (probe.rows[:, -1] == value).all()
    assert ((probe.rows == key[:, None]).sum(1) == 2).all(), "nothing but its telling says the key's value"
    assert synthetic.recalled(Copier(distance), probe) == 1
    assert synthetic.recalled(Copier(distance - 1), probe) < 0.3
    assert synthetic.pair_probe(torch.arange(2), [], distance, chance()) is None


@pytest.mark.parametrize("distance", [40, 101])
def test_passkey_is_told_at_its_distance(distance, numbers):
    probe = synthetic.passkey_probe(numbers, torch.arange(9, 30), [0], distance, chance())
    assert 1 <= probe.answers <= 5
    told = probe.rows[:, 1 : probe.rows.shape[1] - distance]
    assert (told == probe.rows[:, 1 + distance :]).all() and len(told.unique(dim=0)) > 20
    assert numbers.decode(told[0]).strip().startswith("The pass key is")
    assert synthetic.recalled(Copier(distance), probe) == 1
    assert synthetic.recalled(Copier(distance - 2), probe) == 0
    assert synthetic.passkey_probe(numbers, torch.arange(9, 30), [0], 4, chance()) is None, "too near"


def test_recall_reads_long_rows_in_pieces(monkeypatch):
    model = swapped("llama", num_hidden_layers=2)
    probe = synthetic.pair_probe(torch.arange(5, 99), [1], 50, chance())
    with torch.no_grad():
        best = model(input_ids=probe.rows).logits[:, -2].argmax(-1)
    expected = (best == probe.rows[:, -1]).double().mean().item()
    assert synthetic.recalled(model, probe) == expected
    rows = probe.rows.clone()
    rows[:, -1] = best
    easy = synthetic.Probe(50, rows, 1)
    monkeypatch.setattr("linearize_cli.metrics.predictions.AT_ONCE", 20)
    assert synthetic.recalled(model, easy) == 1


def test_distances_surround_the_window():
    assert synthetic.distances(32, 300) == [16, 32, 64, 128, 256]
    assert synthetic.distances(4, 20) == [8, 16]
    probes = [synthetic.pair_probe(torch.arange(5, 50), [1], d, chance()) for d in (8, 16)]
    found = synthetic.by_distance({"teacher": Copier(8), "student": Copier(16)}, probes, lambda tokens: None)
    assert [part["distance"] for part in found["by_distance"]] == [8, 16]
    assert found["by_distance"][0]["teacher"] == found["by_distance"][1]["student"] == 1
    assert found["teacher"] == sum(part["teacher"] for part in found["by_distance"]) / 2


def test_repetition_by_hand():
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert repetition(rows[:1]) == pytest.approx(2 / 6) and repetition(rows) == pytest.approx(2 / 12)
    assert repetition(rows[:, :3]) is None


def test_agreement_counts_up_to_the_first_difference():
    assert agreed(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 9], [0, 5, 6]])) == 1.0


def test_continuations_are_those_of_generate():
    model = swapped("llama", num_hidden_layers=2)
    task, rows = CausalLM(model, encoders.tokenizer()), torch.randint(3, 99, (3, 11), generator=chance())
    ours = continued(task, model, rows, 9, greedy)
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    theirs = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
    assert torch.equal(ours, theirs[:, 11:])
    draws = [continued(task, model, rows, 9, sampling(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_model_beside_itself_writes_the_same():
    model, text = tiny_model("llama"), torch.randint(3, 99, (4, 20), generator=chance())
    twins = {"teacher": model, "student": model}
    report = generation(CausalLM(model, encoders.tokenizer()), twins, text, 8, 0, lambda tokens: None)
    assert report["exact_match"] == {"mean": 12.0, "of": 12}
    for way in ("greedy", "sampled"):
        assert report["repetition"][way]["teacher"] == report["repetition"][way]["student"]
    assert report["repetition"]["text"] == 0


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "3", '{"stage": "transfer", "layers": {"a": "x"}}', '{"stage": "transfer", "layers": 3}'],
)
def test_a_damaged_log_draws_no_figure(line, tmp_path):
    whole = '{"stage": "transfer", "step": 1, "layers": {"a": 0.5}}\n'
    (tmp_path / "log.jsonl").write_text(whole)
    assert plots.transfer(tmp_path / "log.jsonl") is not None
    (tmp_path / "log.jsonl").write_text(whole + line)
    assert plots.transfer(tmp_path / "log.jsonl") is None

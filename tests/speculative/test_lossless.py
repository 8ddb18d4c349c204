"""Converted models at their real sizes: what is drafted, and by whom, changes none of their greedy tokens."""

import random
from pathlib import Path

import pytest
import torch
from drafters import Oracle
from token_trees import random_tree
from transformers import GenerationConfig

from linearize_cli import convert, load
from linearize_cli.models.decoding import pad_left
from linearize_cli.speculative.assisted import assisted
from linearize_cli.speculative.decode import speculate, written
from linearize_cli.speculative.drafts import Lookup
from linearize_cli.speculative.medusa import MedusaHeads
from linearize_cli.speculative.pairs import drafted_by, drafting_for_teacher
from linearize_cli.speculative.trees import chain, named_tree

STORIES = Path(__file__).parents[3] / "shared/checkpoints/stories260k-llama"
SIZE = 32  # of windows and groups: 256 tokens cross 8
PROMPTS, NEW = 100, 256
MODELS = ["stories260k-llama", "demo"]
FORMS = {
    "sliding": dict(method="augmented"),
    "groups": dict(method="augmented:flash"),
    "hybrid": dict(method="augmented", keep_softmax="1"),
}
BATCH = 50


QUICK = [("stories260k-llama", "hybrid"), ("demo", "sliding"), ("demo", "groups")]


def cases() -> list:
    every = [(model, form) for model in MODELS for form in FORMS]
    return [
        pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case))
        for case in every
    ]


@pytest.fixture(scope="module", params=cases())
def artifact(request, tmp_path_factory):
    """Right after the swap: exactness does not wait for quality."""
    model, form = request.param
    if model != "demo" and not STORIES.exists():
        pytest.skip(f"{STORIES} is not there")
    folder = tmp_path_factory.mktemp("lossless") / "artifact"
    window = (f"attention.local.size={SIZE}",)
    convert(model if model == "demo" else str(STORIES), folder, overrides=window, train=False, **FORMS[form])
    return folder


def prompts_of(model, count: int) -> list[list[int]]:
    """Random beginnings of 2 to 40 tokens."""
    rng, vocabulary = random.Random(0), model.config.vocab_size
    return [[1, *rng.choices(range(3, vocabulary), k=rng.randint(1, 39))] for _ in range(count)]


@torch.no_grad()
def greedy(model, prompts, max_new: int) -> list[list[int]]:
    """The new tokens of transformers' own greedy decoding."""
    found = []
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    for first in range(0, len(prompts), BATCH):
        rows = [torch.tensor(prompt) for prompt in prompts[first : first + BATCH]]
        ids, mask = pad_left(rows)
        written = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False)
        found += written[:, ids.shape[1] :].tolist()
    model.generation_config = own
    return found


def mismatches(found, expected) -> int:
    return sum(
        a != b for row, other in zip(found, expected, strict=True) for a, b in zip(row, other, strict=True)
    )


def oracle(model, known):
    """Trees of which many nodes are right."""
    rng = random.Random(2)
    return Oracle(known, 0.7, [random_tree(rng, 16) for _ in range(6)], model.config.vocab_size)


def medusa(model, known):
    """64 nodes of heads that were not trained: they say again what the model's own head says."""
    tree = named_tree("mc_sim_7b_63", 4, model.config.vocab_size, chain(4))
    return MedusaHeads.of(model, 4).drafter(tree)


DRAFTERS = {"lookup": lambda model, known: Lookup(), "oracle": oracle, "medusa": medusa}


def check_trees(model, count: int, max_new: int, name: str) -> None:
    """In batches of rows that accept unequally."""
    prompts = prompts_of(model, count)
    expected = greedy(model, prompts, max_new)
    found, accepted = [], 0
    for first in range(0, count, BATCH):
        rows, known = prompts[first : first + BATCH], expected[first : first + BATCH]
        whole = [[*row, *new] for row, new in zip(rows, known, strict=True)]
        steps = list(speculate(model, rows, DRAFTERS[name](model, whole), max_new))
        accepted += sum(n or 0 for step in steps for n in step.accepted)
        found += written(steps)
    assert mismatches(found, expected) == 0
    assert accepted > count * max_new / 50


def check_pair(pair, count: int, max_new: int) -> None:
    prompts = prompts_of(pair.target, count)
    expected = greedy(pair.target, prompts, max_new)
    runs = [assisted(pair, prompt, max_new) for prompt in prompts]
    found = [written(steps)[0] for steps in runs]
    assert mismatches(found, expected) == 0
    assert sum(map(len, runs)) < count * max_new * 0.95


PAIRS = ["assisted", "self-draft"]


def pair_of(artifact, name):
    """The softmax model drafts for the artifact, or the artifact for it."""
    if name == "self-draft":
        return drafting_for_teacher(artifact)
    return drafted_by(artifact, drafting_for_teacher(artifact).target.name_or_path)


@pytest.mark.parametrize("name", DRAFTERS)
def test_trees_change_no_token(artifact, name):
    check_trees(load(artifact)[0], 4, 3 * SIZE, name)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_change_no_token(artifact, name):
    check_pair(pair_of(artifact, name), 1, 3 * SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_trees_change_none_of_25600_tokens(artifact, name):
    check_trees(load(artifact)[0], PROMPTS, NEW, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_change_none_of_25600_tokens(artifact, name):
    check_pair(pair_of(artifact, name), PROMPTS, NEW)


def test_stock_generate_with_prompt_lookup(artifact):
    model = load(artifact)[0]
    ids = torch.tensor([prompts_of(model, 1)[0] * 2])
    plain = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3 * SIZE, do_sample=False)
    expected = model.generate(ids, **plain)
    assert torch.equal(model.generate(ids, **plain, prompt_lookup_num_tokens=6), expected)

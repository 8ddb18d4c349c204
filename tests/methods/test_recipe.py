"""Recipes: every shipped one reads, and what does not fit is said all at once with key paths."""

import pytest
import yaml

from linearize_cli.errors import LINES, WIDTH, UserError
from linearize_cli.methods.recipe import Distill, Transfer, learning_rates, parse_count, transfer_rate
from linearize_cli.methods.registry import load_recipe, method_names

BASES = ["based", "flash", "flash-local", "gated-delta", "gla", "hedgehog", "kda", "lightning", "linformer"]
BASES += ["lolcats", "lolcats-group", "mamba2", "performer", "relu", "retention", "transnormer", "window"]
BASES += ["yoso", "yoso-e"]
METHODS = ["augmented", *BASES, *(f"augmented:{base}" for base in BASES if base != "hedgehog")]


def test_the_methods_are_there():
    assert method_names() == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_dumped_recipe_reads_back_the_same(method, tmp_path):
    recipe = load_recipe(method)
    assert recipe.name == method and recipe.summary and recipe.paper
    file = tmp_path / "copy.yaml"
    file.write_text(recipe.dump())
    assert load_recipe(str(file)) == recipe


def test_the_default_is_the_contract_s():
    attention = load_recipe("augmented").to_dict()["attention"]
    assert attention == {
        "local": {"scope": "sliding", "size": 64, "score": "softmax"},
        "far": {"feature_map": "hedgehog", "feature_dim": 64, "per_query_head": False, "key_weight": True},
        "memory": {"kind": "none"},
        "combine": "shared",
        "conv": {"width": 32},
        "sinks": 4,
        "cross": "softmax",
    }


def test_overrides_reach_any_depth():
    recipe = load_recipe(
        "window", ["attention.local.size=32", "recover.distill.lora.rank=4", "recover.tokens=650k"]
    )
    assert recipe.attention.local.size == 32
    assert recipe.recover.distill.lora.rank == 4
    assert recipe.recover.tokens == 650_000
    assert load_recipe("augmented", ["attention.far=null"]).attention.far is None


def test_all_unknown_keys_are_named_at_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "mine",
                "colour": 1,
                "attention": {"locl": {}, "far": {"dim": 3, "feature_map": "hedgehog"}},
            }
        )
    )
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    message = str(error.value)
    assert all(key in message for key in ("colour", "attention.locl", "attention.far.dim", str(file)))
    assert "did you mean local" in message


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("augmented", "attention.local.size=0", ["attention.local.size"]),
        ("augmented", "attention.local.size=true", ["attention.local.size", "int"]),
        ("augmented", "attention.local.scope=block", ["scope", "sliding", "group"]),
        ("augmented", "attention.far.feature_map=cosine", ["feature_map", "hedgehog"]),
        ("augmented", "attention.combine=none", ["softmax", "combine"]),
        ("augmented", "attention.local.score=relu2", ["relu2", "combine"]),
        ("flash", "attention.sinks=4", ["attention.sinks"]),
        ("lolcats", "attention.far=null", ["lolcats"]),
        ("window", "attention.local=null", ["nothing would be attended"]),
        ("augmented", "attention.memory.kind=fading", ["memory.kind", "none", "delta"]),
        ("augmented", "attention.memory.kind=delta", ["attention.memory.kind", "attention.combine"]),
        (
            "flash",
            "attention.memory.kind=delta",
            ["attention.memory.kind", "attention.local.score", "attention.local.scope"],
        ),
        ("window", "attention.memory.kind=decay", ["attention.memory.kind", "attention.far"]),
        ("linformer", "attention.memory.kind=decay", ["attention.memory.kind", "attention.far.feature_map"]),
        ("augmented:linformer", "attention.combine=shared", ["attention.far.feature_map", "gate"]),
        ("mamba2", "attention.combine=shared", ["attention.far.feature_map", "negative"]),
        ("hedgehog", "attention.combine=gate", ["attention.combine", "gate"]),
        ("window", "attention.combine=rms", ["attention.local.score", "attention.combine"]),
        ("augmented", "recover.distill.lr=fast", ["recover.distill.lr", "auto"]),
        ("augmented", "recover.distill.lr=.nan", ["recover.distill.lr"]),
        ("augmented", "recover.transfer.lr=.inf", ["recover.transfer.lr"]),
        ("augmented", "recover.distill.kl=0", ["recover.distill.kl", "nothing would be learned"]),
        ("augmented", "recover.distill.kl=-1", ["recover.distill.kl"]),
        ("augmented", "recover.tokens=-5", ["recover.tokens"]),
        ("augmented", "attention.far.feature_dim=100000", ["attention.far.feature_dim", "8192"]),
        ("augmented", "attention.local={", ["attention.local", "YAML"]),
        ("augmented", "recover.tokens=[1]", ["recover.tokens", "650k"]),
        ("augmented", "recover.tokens={a: 1}", ["recover.tokens", "650k"]),
        ("augmented", "recover.tokens=true", ["recover.tokens", "650k"]),
        ("augmented", "recover.tokens=.inf", ["recover.tokens", "650k"]),
        ("augmented", "recover.tokens=1" + "0" * 30, ["recover.tokens", "650k"]),
        ("augmented", "recover.tokens=2020-01-01", ["recover.tokens", "650k"]),
        ("augmented", "recover.tokens=" + "9" * 5000, ["recover.tokens", "YAML"]),
        ("augmented", "attention.local.size=[4]", ["attention.local.size", "int"]),
        ("augmented", "attention.local.size=1" + "0" * 30, ["attention.local.size", "2147483647"]),
        ("augmented", "attention.sinks=10000000", ["attention.sinks", "8192"]),
        ("augmented", "recover.distill.lora.rank=10000000", ["lora.rank", "8192"]),
        ("augmented", "recover.distill.lora.alpha=.inf", ["lora.alpha", "number"]),
        ("augmented", "recover.distill.kl=1" + "0" * 400, ["recover.distill.kl", "number"]),
        ("augmented", "recover.distill.kl=[1]", ["recover.distill.kl", "number"]),
        ("augmented", "recover.transfer.clip=2020-01-01", ["recover.transfer.clip", "number"]),
        ("augmented", "name=&a [*a]", ["name", "alias"]),
        ("augmented", "name=" + "[" * 6000, ["name", "levels"]),
        ("augmented", "name" + ".a" * 6000 + "=1", ["--set", "levels"]),
        ("augmented", "recover.transfer.share=2", ["share"]),
        ("augmented", "attention", ["KEY=VALUE"]),
    ],
)
def test_misfits_are_refused_with_their_keys(method, override, words):
    with pytest.raises(UserError) as error:
        load_recipe(method, [override])
    message = str(error.value)
    assert all(word in message for word in words)
    assert len(message.splitlines()) <= LINES and max(map(len, message.splitlines())) <= WIDTH


def test_an_unknown_method_is_answered_with_the_nearest_and_the_list():
    with pytest.raises(UserError) as error:
        load_recipe("augmentd")
    assert "Did you mean augmented?" in str(error.value)
    assert all(method in str(error.value) for method in METHODS)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_recipe(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("text", "count"), [("650k", 650_000), ("40M", 40_000_000), ("1_000", 1000), ("1.5k", 1500), (2e3, 2000)]
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "-3", "0", "1.5", "many", "nan", "inf", [1], True, None, 10**30, 1.5]
)
def test_no_counts(text):
    with pytest.raises(ValueError):
        parse_count(text)


def test_rates_fall_with_the_width():
    auto = Distill(linear_lr="auto")
    assert learning_rates(auto, 64) == pytest.approx((2e-3, 6e-3))
    assert learning_rates(auto, 1024) == pytest.approx((8e-4, 2.4e-3))
    assert learning_rates(auto, 4096) == pytest.approx((2e-4, 6e-4))
    embedding = Distill(linear_lr="auto", kl=0.0, hidden=1.0, embedding=1.0)
    assert learning_rates(embedding, 384) == pytest.approx((2e-3 / 3, 2e-3))
    assert learning_rates(Distill(), 64) == (pytest.approx(2e-3), None)
    assert learning_rates(Distill(lr=1e-3, linear_lr="auto"), 4096) == (1e-3, pytest.approx(3e-3))
    assert learning_rates(Distill(lr=1e-3, linear_lr=1e-2), 4096) == (1e-3, 1e-2)


def test_the_rate_of_transfer_falls_with_the_size_of_the_heads():
    assert transfer_rate(Transfer(lr="auto"), 128) == pytest.approx(1e-2)
    assert transfer_rate(Transfer(lr="auto"), 8) == pytest.approx(4e-2)
    assert transfer_rate(Transfer(lr=3e-3), 8) == 3e-3

"""Every method, from a checkpoint to a tree read by the artifact; and methods and feature maps of a user's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from convert_case import METHODS, make_teacher, run
from linearize_kernels.parts.feature_maps import FEATURE_MAPS
from torch.nn.functional import kl_div

from linearize_cli.artifact.load import load
from linearize_cli.cli import main
from linearize_cli.errors import UserError
from linearize_cli.methods.registry import load_recipe, method_names, read_recipe
from linearize_cli.models.load import load_teacher
from linearize_cli.runtime.tree import read_tree

EXAMPLES = Path(__file__).parents[2] / "examples"
PARENTS = [-1, 0, 0, 1, 3, 4, 4, 2, 5]


MINE = """
from linearize_kernels.parts.feature_maps import FeatureMap, feature_map


@feature_map("mine")
class Mine(FeatureMap):
    positive = True

    def forward(self, x):
        {}
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def small(method: str) -> tuple[str, ...]:
    """Overrides that cross windows, groups and the conv many times in a short text."""
    attention, sizes = read_recipe(method).attention, []
    if attention.local:
        sizes.append("attention.local.size=4")
    if attention.conv.width:
        sizes.append("attention.conv.width=3")
    if attention.far and attention.far.feature_dim:
        sizes.append("attention.far.feature_dim=6")
    return tuple(sizes)


def close(logits, reference):
    assert reference.isfinite().all()
    torch.testing.assert_close(logits, reference, atol=3e-5 * float(reference.abs().max()), rtol=0.0)


@torch.no_grad()
def divergence(teacher, model) -> float:
    """KL to the teacher on fixed text that the recovery has not seen."""
    ids = torch.randint(3, model.config.vocab_size, (64, 24), generator=torch.Generator().manual_seed(5))
    expected = load_teacher(teacher.path)[0](ids).logits.log_softmax(-1)
    return kl_div(model(ids).logits.log_softmax(-1), expected, log_target=True, reduction="sum").item()


def check_trees(model) -> None:
    """Tokens one by one equal one forward, and every node of a tree its path, wherever the tree begins."""
    ids = torch.randint(3, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache, tree_at = None, {5, 8, 19}
        for t in range(21):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            close(out.logits[:, 0], full[:, t])
            if t + 1 in tree_at:
                tree = read_tree(model, cache, ids[:, 21:30], PARENTS)
                for node in range(len(PARENTS)):
                    path = [node]
                    while PARENTS[path[0]] >= 0:
                        path.insert(0, PARENTS[path[0]])
                    text = torch.cat([ids[:, : t + 1], ids[:, 21:30][:, path]], 1)
                    close(tree.logits[:, node], model(text, use_cache=False).logits[:, -1])


@pytest.mark.parametrize(
    ("method", "keep"),
    [
        *(pytest.param(name, None, id=f"{name}-all linear") for name in method_names()),
        *(
            pytest.param(*x.values, "at:1", id=f"{x.values[0]}-one softmax layer", marks=x.marks)
            for x in METHODS
        ),
    ],
)
def test_every_method_from_swap_to_tree(method, keep, teacher, tmp_path):
    # The loss that is looked at below and a rate for a small model, whichever are the method's own.
    rates = ("recover.distill.kl=1", "recover.distill.ce=0", "recover.distill.lr=4e-3")
    overrides = (*small(method), *rates)
    common = dict(method=method, overrides=overrides, keep_softmax=keep)
    run(teacher, tmp_path / "swapped", train=False, **common)
    report = run(teacher, tmp_path / "out", seq_len=24, tokens=24 * 4 * 50, **common)
    assert len(report["layers"]["softmax"]) == (keep is not None)
    assert all(difference is not None for difference in report["self_check"].values())
    model, _ = load(tmp_path / "out")
    assert divergence(teacher, model) < divergence(teacher, load(tmp_path / "swapped")[0])
    check_trees(model)


def test_a_new_method_is_one_file(teacher, tmp_path):
    """examples/retention_window.yaml joins parts that no recipe joins."""
    recipe = str(EXAMPLES / "retention_window.yaml")
    parts = yaml.safe_load(Path(recipe).read_text())["attention"]
    assert all(load_recipe(name).to_dict()["attention"] != parts for name in method_names())
    run(teacher, tmp_path / "out", method=recipe, overrides=small(recipe))
    check_trees(load(tmp_path / "out")[0])


def test_a_new_feature_map_is_one_class_and_travels_along(teacher, tmp_path):
    """examples/softplus.py and its recipe: the artifact loads where neither they nor this package are known."""
    recipe = str(EXAMPLES / "softplus.yaml")
    out = tmp_path / "out"
    run(teacher, out, method=recipe, overrides=small(recipe), trust_remote_code=True)
    assert (out / "linearize_own_softplus.py").exists()
    model, _ = load(out)
    check_trees(model)
    ids = torch.arange(3, 15)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(ids).logits
    torch.save(logits, tmp_path / "logits.pt")
    script = f"""
import sys, torch
from importlib.abc import MetaPathFinder
class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("linearize_cli", "linearize_kernels"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
ids = torch.arange(3, 15)[None] % model.config.vocab_size
assert torch.equal(model(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}))
model.save_pretrained({str(tmp_path / "again")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "again" / "linearize_own_softplus.py").exists()


def test_a_feature_map_in_an_artifact_runs_only_if_trusted(teacher, tmp_path, monkeypatch):
    recipe = str(EXAMPLES / "softplus.yaml")
    trusted = dict(train=False, trust_remote_code=True)
    run(teacher, tmp_path / "out", method=recipe, overrides=small(recipe), **trusted)
    monkeypatch.delitem(FEATURE_MAPS, "softplus")
    with pytest.raises(UserError, match="linearize_own_softplus.py, which was not run"):
        load(tmp_path / "out")
    check_trees(load(tmp_path / "out", trust_remote_code=True)[0])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "there is no file"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("class Mine: ...", "has no feature map Mine"),
        ("from linearize_kernels.parts.feature_maps import FeatureMap as Mine", "has no feature map Mine"),
        (MINE.format("raise ValueError('boom')"), "boom"),
        (MINE.format("return x[..., 1:]"), r"shape \[2, 3, 33, 7\]"),
        (MINE.format("return x, x"), "fails"),
        (MINE.format("return x / 0"), "not finite"),
        (MINE.format("return x"), "negative weights"),
    ],
)
def test_a_feature_map_that_is_not_there_is_refused(code, words, tmp_path):
    if code is not None:
        (tmp_path / "mine.py").write_text(code)
    recipe = {"name": "mine", "attention": {"far": {"feature_map": "mine.py:Mine"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=words):
        load_recipe(str(tmp_path / "mine.yaml"), trust_remote_code=True)


RUNS = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("ran")
""" + MINE.format("return x.exp()")


@pytest.fixture
def own(tmp_path):
    """Return a function that writes a recipe with code of its own and names the file; the code leaves a mark."""
    code = tmp_path / "inside" / "sub" / "mine.py"
    code.parent.mkdir(parents=True)
    (tmp_path / "mine.py").write_text(RUNS)
    code.write_text(RUNS)

    def own(file="sub/mine.py"):
        recipe = {"name": "mine", "attention": {"far": {"feature_map": f"{file}:Mine"}}}
        path = tmp_path / "inside" / "mine.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    yield own
    FEATURE_MAPS.pop("mine", None)


def test_a_recipes_code_is_never_run_unasked(own, teacher, tmp_path, monkeypatch, capsys):
    recipe, code = own(), "attention.far.feature_map=mine.py:Mine"
    monkeypatch.chdir(tmp_path)
    for method, overrides in ((recipe, ()), ("hedgehog", (code,)), (recipe, ("attention.sinks=0",))):
        for dry_run in (True, False):
            with pytest.raises(UserError, match="mine.py, which was not run\n.*--trust-remote-code"):
                run(teacher, tmp_path / "out", method=method, overrides=overrides, dry_run=dry_run)
    with pytest.raises(SystemExit) as ended:
        main(["methods", recipe])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert not ended.value.code and printed["attention"]["far"]["feature_map"] == "sub/mine.py:Mine"
    assert not list(tmp_path.rglob("ran"))

    assert load_recipe(recipe, (), True).attention.far.feature_map == "mine"
    assert load_recipe("hedgehog", (code,), True).attention.far.feature_map == "mine"
    assert len(list(tmp_path.rglob("ran"))) == 2


def test_a_recipes_code_is_inside_its_folder(own, tmp_path):
    (tmp_path / "inside" / "link.py").symlink_to(tmp_path / "mine.py")
    (tmp_path / "inside" / "folder").symlink_to(tmp_path)
    for file in ("../mine.py", str(tmp_path / "mine.py"), "link.py", "folder/mine.py", "sub/../../mine.py"):
        for read in (read_recipe, lambda recipe: load_recipe(recipe, (), True)):
            with pytest.raises(UserError, match="is outside .*inside, the folder of the recipe"):
                read(own(file))
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("file", ["absent.py", "n" * 300 + ".py", "a\0b.py", "", "sub"])
def test_a_recipes_code_that_is_no_file_is_refused(file, own):
    with pytest.raises(UserError, match="there is no file"):
        read_recipe(own(f"{file.removesuffix('.py')}.py"))


def test_a_recipe_with_code_is_checked_without_it(own):
    with pytest.raises(UserError, match="attention.sinks"):
        read_recipe(own(), ["attention.sinks=4"])

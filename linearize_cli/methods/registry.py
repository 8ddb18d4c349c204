"""The registry of methods: the package's recipes, their augmented forms, and recipe files of the user."""

import difflib
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import torch
import yaml
from linearize_kernels.parts.feature_maps import FEATURE_MAPS, FeatureMap

from linearize_cli.errors import UserError
from linearize_cli.inputs import DEEPEST, parse_yaml, read_yaml, user_path
from linearize_cli.methods.compatibility import misfits
from linearize_cli.methods.recipe import Recipe, names_code

DEFAULT, DEFAULT_BASE = "augmented", "hedgehog"
ALL_KEYS = "`linearize methods augmented` prints a recipe with every key."


def method_names() -> list[str]:
    """Return the names of the package's methods: the default, the other recipes, and `augmented:NAME` for
    these.
    """
    names = sorted(p.name[: -len(".yaml")] for p in _folder().iterdir() if p.name.endswith(".yaml"))
    bases = [name for name in names if name != DEFAULT]
    return [DEFAULT, *bases, *(f"{DEFAULT}:{base}" for base in bases if base != DEFAULT_BASE)]


def is_bundled(recipe: Recipe, overrides: Iterable[str]) -> bool:
    """Return True if a recipe's attention is that of the package's method of the same name.

    Args:
        overrides: the `KEY=VALUE` changes that the recipe has already.
    """
    known = recipe.name in method_names()
    return known and read_recipe(recipe.name, overrides).attention == recipe.attention


def read_recipe(method: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by method name or file, apply `KEY=VALUE` overrides and check it. Code that it names is
    not run.

    Raises:
        UserError: the method is unknown, the file cannot be read, or the recipe is invalid. The message names
            every error of the recipe.
    """
    data, where = read_data(method, overrides)
    if names_code(feature_map_of(data)):
        own_file(data, where)
    return checked(data, where)


def load_recipe(method: str, overrides: Iterable[str] = (), trust_remote_code: bool = False) -> Recipe:
    """Read a recipe. If it names a feature map of the user's own (`FILE.py:CLASS`), run that file to register
    it.

    Raises:
        UserError: the method is unknown, the file cannot be read, the recipe is invalid, or it names code and
            `trust_remote_code` is not given.
    """
    data, where = read_data(method, overrides)
    if names_code(feature_map_of(data)):
        path = own_file(data, where)
        if not trust_remote_code:
            raise UserError(
                f"{where}: the code of its feature map is in {path}, which was not run",
                "Read that code. If you trust it, add --trust-remote-code.",
            )
        enter_own_feature_map(data, where, path)
    return checked(data, where)


def read_data(method: str, overrides: Iterable[str]) -> tuple[dict, str]:
    """Return a recipe as plain data with the overrides applied, and the name to use for it in messages."""
    data, where = _read(method)
    for override in overrides:
        _apply(data, override)
    return data, where


def checked(data: dict, where: str) -> Recipe:
    """Check a recipe that was read as plain data (dicts and lists), and return it as a `Recipe`.

    Args:
        where: the recipe's name in messages.

    Raises:
        UserError: unknown keys, invalid values or parts that do not fit together. The message names all of
            them.
    """
    faults = Recipe.faults(data) or misfits(Recipe.model_validate(data))
    if faults:
        raise UserError("\n  ".join((f"the recipe {where} cannot be used:", *faults)), ALL_KEYS)
    return Recipe.model_validate(data)


def augment(base: dict) -> dict:
    """Return a base recipe, as plain data, with a local part and a convolution added (arXiv 2406.07368).

    A base without a local part gets the window and the sinks of the default method. If its features are
    positive, both parts share one normaliser. Otherwise a gate joins them.
    """
    default = yaml.safe_load(_text(DEFAULT))["attention"]
    attention = {**base["attention"], "conv": default["conv"]}
    if "local" not in attention:
        feature_map = FEATURE_MAPS.get(attention["far"]["feature_map"])
        shared = attention.get("combine", "shared") == "shared" and feature_map and feature_map.positive
        combine = "shared" if shared else "gate"
        attention.update(local=default["local"], sinks=default["sinks"], combine=combine)
    return {
        **base,
        "name": f"{DEFAULT}:{base['name']}",
        "summary": f"{base['summary']}; augmented: a local part and a masked conv",
        "paper": f"arXiv 2406.07368; {base['paper']}",
        "attention": attention,
    }


def _folder():
    return resources.files("linearize_cli.recipes")


def _read(method: str) -> tuple[dict, str]:
    """Return a recipe as plain data, and the name to use for it in messages."""
    if method.endswith((".yaml", ".yml")):
        data = read_yaml(user_path(method), "Correct the file, or name a method.")
        if not isinstance(data, dict):
            raise UserError(
                f"{method} holds no recipe", "A recipe is a mapping with a name and an attention part."
            )
        return data, method
    name = DEFAULT if method == f"{DEFAULT}:{DEFAULT_BASE}" else method
    if name not in method_names():
        near = difflib.get_close_matches(name, method_names(), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no method {method!r}", f"{hint}The methods are: {', '.join(method_names())}."
        )
    augmentation, _, base = name.rpartition(":")
    data = yaml.safe_load(_text(base))
    return (augment(data) if augmentation else data), method


def _text(name: str) -> str:
    return _folder().joinpath(f"{name}.yaml").read_text()


def feature_map_of(data: dict) -> object:
    """Return `attention.far.feature_map` of a recipe's plain data, or None if it has no such key."""
    for key in ("attention", "far", "feature_map"):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def own_file(data: dict, where: str) -> Path:
    """Return the path of the user's file that a recipe names as `FILE.py:CLASS`.

    FILE is relative to the folder of the recipe's file. If `--set` names it for a method of the package, it
    is relative to the working directory.

    Raises:
        UserError: there is no such file, or it is outside that folder.
    """
    file = feature_map_of(data).rpartition(":")[0]
    folder = Path(where).parent.resolve()
    path = Path(os.path.realpath(folder / file.replace("\0", "")))
    if not path.is_relative_to(folder):
        what = f"{file[:200]} is outside {folder}, the folder of the recipe"
    elif not os.path.isfile(path):
        what = f"there is no file {file[:200]} in {folder}"
    else:
        return path
    hint = "FILE.py:CLASS names a Python file in the folder of the recipe."
    raise UserError(f"{where}: attention.far.feature_map: {what}", hint)


def enter_own_feature_map(data: dict, where: str, path: Path) -> None:
    """Run the file of a user's feature map, which registers itself, and write its registered name into the
    recipe.

    Args:
        data: the recipe as plain data. It is changed in place.
        where: the recipe's name in messages.
        path: the file.

    Raises:
        UserError: the file fails, or has no such feature map.
    """
    from linearize_cli.runtime.bundle import load_own_code  # slow to import: it needs transformers

    far, cls = data["attention"]["far"], feature_map_of(data).rpartition(":")[2]
    try:
        found = getattr(load_own_code(path), cls, None)
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"{where}: attention.far.feature_map: {path} cannot be loaded: {error}",
            "FILE.py:CLASS names a Python file with a subclass of FeatureMap.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, FeatureMap) and "name" in vars(found)):
        raise UserError(
            f"{where}: attention.far.feature_map: {path} has no feature map {cls}",
            "Write it as a subclass of linearize_kernels.parts.feature_maps.FeatureMap, under @feature_map(NAME).",
        )
    try_feature_map(found, far.get("feature_dim"), f"{where}: attention.far.feature_map: {path.name}:{cls}")
    data["attention"]["far"] = {**far, "feature_map": found.name}


def try_feature_map(cls: type[FeatureMap], feature_dim: int | None, where: str) -> None:
    """Check a user's feature map on random queries and keys.

    Args:
        where: names the feature map in messages.

    Raises:
        UserError: it fails, its features have another shape or are not finite, or they give negative weights
            although the class declares them positive.
    """
    heads, tokens, size = 3, 33, 8
    x = torch.randn(2, heads, tokens, size, generator=torch.Generator().manual_seed(0))
    try:
        found = cls(heads, size, feature_dim, size**-0.5)
        found.reset_parameters()
        with torch.no_grad():
            phi = found(x)
        shape = tuple(phi.shape)
    except Exception as error:  # the user's code may raise anything
        what = f"{where} fails: {type(error).__name__}: {error}"
        raise UserError(what, "It is called as CLASS(heads, head_dim, feature_dim, scale).") from error
    due = (2, heads, tokens, found.feature_dim)
    if shape != due:
        raise UserError(
            f"{where} gives features of shape {list(shape)} for queries of shape {list(x.shape)}",
            f"By its feature_dim, {found.feature_dim}, they should be of shape {list(due)}.",
        )
    if not phi.isfinite().all():
        raise UserError(f"{where} gives features that are not finite", "Mend its forward.")
    if cls.positive and (phi @ phi.transpose(-1, -2)).min() < 0:
        raise UserError(
            f"{where} says that it is positive, and gives negative weights",
            "Set positive = False and join it by combine: gate, or make its features positive.",
        )


def _apply(data: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE", "For example --set attention.local.size=32.")
    *path, last = key.split(".")
    if len(path) > DEEPEST:
        raise UserError(f"--set {override}: the key has more than {DEEPEST} levels", ALL_KEYS)
    for part in path:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    try:
        data[last] = parse_yaml(value)
    except ValueError as error:
        raise UserError(
            f"--set {override}: {value!r} is not valid YAML: {error}", "Correct its brackets or quotes."
        ) from None

"""A method as data: which parts its equation has, where it comes from, and how it is recovered.

A recipe is a YAML file that states deviations from the defaults below. Reading it checks every key at once.
"""

import difflib
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from linearize_cli.errors import UserError

DEFAULT, DEFAULT_BASE = "augmented", "hedgehog"
ALL_KEYS = "`linearize methods augmented` prints a recipe with every key."


@dataclass(frozen=True)
class Local:
    """The near part: `size` tokens of exact attention."""

    scope: str = "sliding"
    size: int = 64
    score: str = "softmax"


@dataclass(frozen=True)
class Far:
    """The rest of the past, through a feature map into a state of fixed size."""

    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    per_query_head: bool = False


@dataclass(frozen=True)
class Memory:
    """How the state forgets."""

    kind: str = "none"


@dataclass(frozen=True)
class Conv:
    """The depthwise conv over values: live taps, 0 for none. They end at the token or, where attention sees both
    sides, lie around it.
    """

    width: int = 0


@dataclass(frozen=True)
class Attention:
    """One layer's equation. `cross` is a decoder's attention to an encoder: softmax, or linear through `far`'s
    feature map alone.
    """

    local: Local | None = None
    far: Far | None = None
    memory: Memory = field(default_factory=Memory)
    combine: str = "shared"
    conv: Conv = field(default_factory=Conv)
    sinks: int = 0
    cross: str = "softmax"


@dataclass(frozen=True)
class Transfer:
    """Each layer learns its softmax layer's output: the share of the tokens, and the rate."""

    share: float = 0.4
    lr: float = 1e-2


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    alpha: float = 16.0


@dataclass(frozen=True)
class Distill:
    """The whole model learns the teacher's logits: rate (auto: by width) and weights of the losses. `hidden` is
    that of the last hidden states' squared error, for classifiers, whose logits say little.
    """

    lr: float | str = "auto"
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True)
class Recover:
    tokens: int = 40_000_000
    data: str = "HuggingFaceFW/fineweb-edu:sample-10BT"
    transfer: Transfer = field(default_factory=Transfer)
    distill: Distill = field(default_factory=Distill)


@dataclass(frozen=True)
class Recipe:
    name: str
    summary: str = ""
    paper: str = ""
    attention: Attention = field(default_factory=Attention)
    recover: Recover = field(default_factory=Recover)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def dump(self) -> str:
        """The recipe as YAML, every key spelled out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def method_names() -> list[str]:
    """The names of the methods that come with the package: the default, the bases, and the bases augmented."""
    names = sorted(p.name[: -len(".yaml")] for p in _folder().iterdir() if p.name.endswith(".yaml"))
    bases = [name for name in names if name != DEFAULT]
    return [DEFAULT, *bases, *(f"{DEFAULT}:{base}" for base in bases if base != DEFAULT_BASE)]


def load_recipe(method: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by method name or file, apply `KEY=VALUE` overrides and check it.

    Raises:
        UserError: unknown method, unreadable file, unknown keys or unfit values (all of them at once).
    """
    from linearize_cli.compatibility import misfits

    data, where = _read(method)
    for override in overrides:
        _apply(data, override)
    enter_own_feature_map(data, where)
    problems: list[str] = []
    recipe = _build(Recipe, data, "", problems)
    if not problems:
        problems = list(misfits(recipe))
    if problems:
        raise UserError(
            f"the recipe {where} cannot be used:\n" + "\n".join(f"  {p}" for p in problems), ALL_KEYS
        )
    return recipe


def augment(base: dict) -> dict:
    """The seed's augmentation of a base recipe (arXiv 2406.07368): a local part and a masked conv.

    A base without a local part gets the default's window and sinks. Far features that are weights share its
    normaliser; others join through a gate.
    """
    from linearize_kernels.features import FEATURE_MAPS

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


def parse_count(text: str | int) -> int:
    """A number of tokens: `650k`, `40M`, `1_000`.

    Raises:
        ValueError: not such a number, or not positive.
    """
    if isinstance(text, int):
        return text
    scales = {"k": 10**3, "m": 10**6, "b": 10**9}
    digits = text.strip().lower().replace("_", "").replace(",", "")
    scale = scales.get(digits[-1:], 1)
    number = float(digits[:-1] if scale > 1 else digits) * scale
    if not 1 <= number < 1e18 or number != int(number):
        raise ValueError(text)
    return int(number)


def _folder():
    return resources.files("linearize_cli.recipes")


def _read(method: str) -> tuple[dict, str]:
    """A recipe as plain data, and what to call it in messages."""
    if method.endswith((".yaml", ".yml")):
        try:
            data = yaml.safe_load(Path(method).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the recipe {method}: {error}", "Name a YAML file, or a method."
            ) from None
        except yaml.YAMLError as error:
            raise UserError(
                f"{method} is not valid YAML: {error}", "Mend the file, or name a method."
            ) from None
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


def enter_own_feature_map(data: dict, where: str) -> None:
    """A recipe may name a feature map of the user's own as `FILE.py:CLASS`, the file beside the recipe: the class
    enters itself in the registry, and the recipe then names it as that does.

    Raises:
        UserError: there is no such file, it fails, or it has no such feature map.
    """
    from linearize_kernels.features import FeatureMap

    from linearize_cli.runtime.bundle import load_own_code

    far = (data.get("attention") or {}).get("far") if isinstance(data.get("attention"), dict) else None
    name = far.get("feature_map") if isinstance(far, dict) else None
    if not (isinstance(name, str) and ".py:" in name):
        return
    file, _, cls = name.rpartition(":")
    path = Path(where).parent / file
    try:
        found = getattr(load_own_code(path), cls, None)
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"{where}: attention.far.feature_map: {path} cannot be loaded: {error}",
            "FILE.py:CLASS names a Python file beside the recipe and a subclass of FeatureMap in it.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, FeatureMap) and "name" in vars(found)):
        raise UserError(
            f"{where}: attention.far.feature_map: {path} has no feature map {cls}",
            "Write it as a subclass of linearize_kernels.features.FeatureMap, under @feature_map(NAME).",
        )
    data["attention"]["far"] = {**far, "feature_map": found.name}


def _apply(data: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE", "For example --set attention.local.size=32.")
    *path, last = key.split(".")
    for part in path:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[last] = yaml.safe_load(value)


def _build(cls: type, data: Any, path: str, problems: list[str]) -> Any:
    """A dataclass from plain data; whatever does not fit is added to `problems` with its key path."""
    if not isinstance(data, dict):
        problems.append(
            f"{path.rstrip('.')}: expected keys ({', '.join(f.name for f in fields(cls))}), got {data!r}"
        )
        return None
    known = {f.name: f.type for f in fields(cls)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f" (did you mean {near[0]}?)" if near else f" (known here: {', '.join(known)})"
            problems.append(f"{path}{key}: unknown key{hint}")
    values = {key: _value(known[key], data[key], f"{path}{key}", problems) for key in data if key in known}
    if cls is Recipe and "name" not in values:
        problems.append("name: missing")
        return None
    return cls(**values)


def _value(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if is_dataclass(option):
            return _build(option, value, f"{path}.", problems)
    if int in options and path.endswith("tokens"):
        try:
            return parse_count(value)
        except ValueError:
            pass
    if float in options and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except (TypeError, ValueError):
            pass
    if any(type(value) is option for option in options):
        return value
    names = " or ".join("nothing" if o is type(None) else o.__name__ for o in options)
    problems.append(f"{path}: expected {names}, got {value!r}")
    return None


def learning_rate(recipe: Recipe, width: int) -> float:
    """The distillation rate: as stated, or falling with the model's width (2e-3 at 64, 2e-4 at 4096)."""
    rate = recipe.recover.distill.lr
    return 2e-3 * (64 / width) ** 0.5537 if rate == "auto" else rate


def with_budget(recipe: Recipe, tokens: int | None = None, data: str | None = None) -> Recipe:
    """The recipe with the command line's budget and data written into it."""
    recover = recipe.recover
    return replace(
        recipe, recover=replace(recover, tokens=tokens or recover.tokens, data=data or recover.data)
    )

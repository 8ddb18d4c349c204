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
    """The causal depthwise conv over values: live taps, 0 for none."""

    width: int = 0


@dataclass(frozen=True)
class Attention:
    local: Local | None = None
    far: Far | None = None
    memory: Memory = field(default_factory=Memory)
    combine: str = "shared"
    conv: Conv = field(default_factory=Conv)
    sinks: int = 0


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
    """The whole model learns the teacher's logits: rate (auto: by width) and weights of the losses."""

    lr: float | str = "auto"
    kl: float = 1.0
    ce: float = 0.0
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
    """The names of the recipes that come with the package, the default first."""
    names = [
        p.name[: -len(".yaml")].replace("-over-", ":")
        for p in _folder().iterdir()
        if p.name.endswith(".yaml")
    ]
    return sorted(names, key=lambda name: (name != "augmented", name))


def load_recipe(method: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by method name or file, apply `KEY=VALUE` overrides and check it.

    Raises:
        UserError: unknown method, unreadable file, unknown keys or unfit values (all of them at once).
    """
    text, where = _read(method)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}", "Mend the file, or name a method.") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{where} holds no recipe", "A recipe is a mapping with a name and an attention part."
        )
    for override in overrides:
        _apply(data, override)
    problems: list[str] = []
    recipe = _build(Recipe, data, "", problems)
    if not problems:
        problems = list(_misfits(recipe))
    if problems:
        raise UserError(
            f"the recipe {where} cannot be used:\n" + "\n".join(f"  {p}" for p in problems), ALL_KEYS
        )
    return recipe


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


def _read(method: str) -> tuple[str, str]:
    if method.endswith((".yaml", ".yml")):
        try:
            return Path(method).read_text(), method
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the recipe {method}: {error}", "Name a YAML file, or a method."
            ) from None
    if method not in method_names():
        near = difflib.get_close_matches(method, method_names(), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no method {method!r}", f"{hint}The methods are: {', '.join(method_names())}."
        )
    return _folder().joinpath(f"{method.replace(':', '-over-')}.yaml").read_text(), method


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


def _misfits(recipe: Recipe) -> Iterable[str]:
    """Values that no part of the library goes by, and parts that do not go together."""
    from linearize_kernels.features import FEATURE_MAPS
    from linearize_kernels.local import COMBINES, SCORES

    a, r = recipe.attention, recipe.recover
    choices = [("attention.combine", a.combine, COMBINES), ("attention.memory.kind", a.memory.kind, ["none"])]
    at_least = [("attention.conv.width", a.conv.width, 0), ("attention.sinks", a.sinks, 0)]
    if a.local:
        choices.append(("attention.local.scope", a.local.scope, ["sliding", "group"]))
        choices.append(("attention.local.score", a.local.score, SCORES))
        at_least.append(("attention.local.size", a.local.size, 1))
    if a.far:
        choices.append(("attention.far.feature_map", a.far.feature_map, FEATURE_MAPS))
        if a.far.feature_dim is not None:
            at_least.append(("attention.far.feature_dim", a.far.feature_dim, 1))
    at_least.append(("recover.distill.lora.rank", r.distill.lora.rank, 1))
    for path, value, allowed in choices:
        if value not in allowed:
            yield f"{path}: {value!r} is none of {', '.join(allowed)}"
    for path, value, least in at_least:
        if value < least:
            yield f"{path}: {value} is less than {least}"
    if not a.local and not a.far:
        yield "attention: neither local nor far: nothing would be attended to"
    if a.local and a.local.score == "relu2" and a.combine != "none":
        yield f"attention.local.score, attention.combine: relu2 is a weight, not a logit: {a.combine} needs softmax"
    if a.combine == "none" and a.local and a.local.score == "softmax":
        yield "attention.local.score, attention.combine: softmax scores need a normaliser: shared or lolcats"
    if a.combine == "lolcats" and not (a.local and a.far):
        yield "attention.combine: lolcats joins a local and a far part; one is missing"
    if a.sinks and not (a.local and a.local.score == "softmax"):
        yield "attention.sinks: sinks are tokens of the local softmax part, which is missing"
    if not 0 <= r.transfer.share <= 1:
        yield f"recover.transfer.share: {r.transfer.share} is not between 0 and 1"
    if isinstance(r.distill.lr, str) and r.distill.lr != "auto":
        yield f"recover.distill.lr: {r.distill.lr!r} is neither a number nor auto"


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

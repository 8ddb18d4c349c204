"""A method as data: which parts its equation has, where it comes from, and how it is recovered.

A recipe is a YAML file that states deviations from the defaults below.
"""

import difflib
import math
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Union, get_args, get_origin

import yaml

LARGEST = 2**31 - 1  # of a whole number in a recipe


@dataclass(frozen=True)
class Local:
    """The near part: `size` tokens of exact attention."""

    scope: str = "sliding"
    size: int = 64
    score: str = "softmax"


@dataclass(frozen=True)
class Far:
    """The rest of the past, through a feature map into a state of fixed size; `key_weight`: each key counts with a
    learned weight.
    """

    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    per_query_head: bool = False
    key_weight: bool = False


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
class Stage:
    """What the two stages of training have in common.

    Attributes:
        warmup: share of the steps in which the rate rises, before it falls to zero as a cosine.
        clip: the longest gradient (norm over all that is trained) that is followed at its length; null: any.
        evaluate: share of the steps between two looks at held-out text, the best of which counts in the end; 0: none.
        early_stop: looks without an improvement after which the stage ends; null: it goes on to its last step.
        key: where its rate is set.
    """

    key: ClassVar[str]
    warmup: float = 0.1
    clip: float | None = 1.0
    evaluate: float = 0.0
    early_stop: int | None = None


@dataclass(frozen=True)
class Transfer(Stage):
    """Each layer learns its softmax layer's output.

    Attributes:
        share: that of the tokens.
        lr: the rate; auto: 1e-2 at heads of 128 and more for smaller ones, so that it stays the same share of a
            projection's entries, which are 1 / sqrt(head size) long.
        window_dropout: how probable it is that a step has a random shorter window in every layer, so that the far
            part learns what it hides; at the first step, from where it falls to 0 at the last.
        block_layers: how many layers are on the device at a time; 0 or null: all.
    """

    share: float = 0.4
    lr: float | str = 1e-2
    window_dropout: float = 0.0
    block_layers: int | None = 0
    linear_lr: ClassVar[None] = None  # all that transfer trains is linear
    key: ClassVar[str] = "recover.transfer.lr"


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the weights.

    Attributes:
        rank: of the updates.
        alpha: their factor, times the rank.
        targets: the Linear layers that have one: `attention`, those of the converted modules, or `all`, those of
            the layers around them too (MLPs).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "attention"


@dataclass(frozen=True)
class Distill(Stage):
    """The whole model learns the teacher's logits.

    Attributes:
        lr: the rate; auto: falls with the model's width.
        linear_lr: that of the linear parts alone; auto: three times `lr`; null: as `lr`.
        kl: weight of the divergence from the teacher's logits.
        ce: weight of the cross entropy of the right answers.
        hidden: weight of the last hidden states' squared error; for classifiers, whose logits say little.
        lora: what is trained beside the linear parts; null: every weight but the embeddings, beside a frozen copy
            of the teacher.
        checkpointing: compute activations again in the backward instead of keeping them: less memory, more time.
    """

    lr: float | str = "auto"
    linear_lr: float | str | None = None
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    lora: Lora | None = field(default_factory=Lora)
    checkpointing: bool = False
    key: ClassVar[str] = "recover.distill.lr"


@dataclass(frozen=True)
class HeadStage(Stage):
    """Medusa heads learn which tokens follow so many places later; no part of a recipe.

    Attributes:
        lr: the rate; auto: falls with the model's width.
        decay: a head counts so many times as much as the one before.
    """

    lr: float | str = "auto"
    decay: float = 0.8
    linear_lr: ClassVar[None] = None  # the model is frozen
    key: ClassVar[str] = "--lr"


@dataclass(frozen=True)
class Recover:
    """Training: tokens in all, and the text they come from. `separate_documents` lets no document see another
    in its block; `assistant_only` learns what the assistant says in a chat and nothing else.
    """

    tokens: int = 40_000_000
    data: str = "HuggingFaceFW/fineweb-edu:sample-10BT"
    separate_documents: bool = False
    assistant_only: bool = False
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


def names_code(feature_map: object) -> bool:
    """Return whether a feature map is a user's own, in Python code beside the recipe: `FILE.py:CLASS`."""
    return isinstance(feature_map, str) and ".py:" in feature_map


def parse_count(text: Any) -> int:
    """A number of tokens: `650k`, `40M`, `1_000`.

    Raises:
        ValueError: not such a number, or not positive.
    """
    if isinstance(text, str):
        scales = {"k": 10**3, "m": 10**6, "b": 10**9}
        digits = text.strip().lower().replace("_", "").replace(",", "")
        scale = scales.get(digits[-1:], 1)
        number = float(digits[:-1] if scale > 1 else digits) * scale
    else:
        number = text if isinstance(text, int | float) and not isinstance(text, bool) else 0
    if not 1 <= number < 1e18 or number != int(number):
        raise ValueError(text)
    return int(number)


def build(cls: type, data: Any, path: str, problems: list[str]) -> Any:
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
            return build(option, value, f"{path}.", problems)
    if int in options and path.endswith("tokens"):
        try:
            return parse_count(value)
        except ValueError:
            problems.append(f"{path}: expected a number of tokens such as 650k, got {value!r}")
            return None
    if float in options and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 as text
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    if any(type(value) is option for option in options if option is not float):
        if type(value) is not int or abs(value) <= LARGEST:
            return value
        problems.append(f"{path}: the number is beyond {LARGEST}")
        return None
    names = " or ".join("nothing" if o is type(None) else o.__name__ for o in options)
    problems.append(f"{path}: expected {names}, got {value!r}")
    return None


def transfer_rate(transfer: Transfer, head_dim: int) -> float:
    """The rate of transfer: as stated, or by the size of the heads' keys."""
    return 1e-2 * (128 / head_dim) ** 0.5 if transfer.lr == "auto" else transfer.lr


def learning_rates(distill: Distill, width: int) -> tuple[float, float | None]:
    """The rates of distillation, `lr` and `linear_lr`: as stated, or falling with the model's width (2e-3 at 64, 2e-4
    at 4096) and three times that.
    """
    rate = 2e-3 * (64 / width) ** 0.5537 if distill.lr == "auto" else distill.lr
    return rate, 3 * rate if distill.linear_lr == "auto" else distill.linear_lr


def head_rate(stage: HeadStage, width: int) -> float:
    """The rate of Medusa heads: as stated, or Medusa's 1e-3 at 4096 and more for smaller widths (6.5e-3 at 96)."""
    return 1e-3 * (4096 / width) ** 0.5 if stage.lr == "auto" else stage.lr


def with_budget(recipe: Recipe, tokens: int | None = None, data: str | None = None) -> Recipe:
    """The recipe with the command line's budget and data written into it."""
    recover = recipe.recover
    return replace(
        recipe, recover=replace(recover, tokens=tokens or recover.tokens, data=data or recover.data)
    )

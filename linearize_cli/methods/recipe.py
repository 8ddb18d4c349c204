"""The schema of a recipe: the parts of a method's attention equation, its paper, and how quality is
recovered.

A recipe is a YAML file that states deviations from the defaults below. `compatibility` has the rules between
keys.
"""

import difflib
import math
import reprlib
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

LARGEST = 2**31 - 1  # the largest whole number in a recipe
MOST = 8192  # features, sinks or ranks: more would outweigh the cache or the weights that they replace


def parse_count(value: Any) -> int:
    """Return a number of tokens that is written as `650k`, `40M` or `1_000`.

    Raises:
        ValueError: the value is not such a number, or not positive.
    """
    scales = {"k": 10**3, "m": 10**6, "b": 10**9}
    number = value
    try:
        if isinstance(value, str):
            digits = value.strip().lower().replace("_", "").replace(",", "")
            scale = scales.get(digits[-1:], 1)
            number = float(digits[:-1] if scale > 1 else digits) * scale
        if not isinstance(number, bool) and 1 <= number < 1e18 and number == int(number):
            return int(number)
    except (TypeError, ValueError):
        pass
    raise ValueError("should be a number of tokens such as 650k or 40M")


def parse_number(value: Any) -> Any:
    """Return the number in a text, because YAML 1.1 reads 1e-3 as text. Return any other value unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_rate(value: Any) -> float | str:
    """Return a learning rate: a number above 0, or `auto`.

    Raises:
        ValueError: the value is neither.
    """
    rate = parse_number(value)
    if value == "auto" or (type(rate) in (int, float) and 0 < rate < math.inf):
        return rate
    raise ValueError("should be a number above 0, or auto")


Number = Annotated[FiniteFloat, BeforeValidator(parse_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0)]
Rate = Annotated[float | str, BeforeValidator(parse_rate)]
Tokens = Annotated[int, BeforeValidator(parse_count)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Width = Annotated[int, Field(ge=0, le=LARGEST)]
Dimension = Annotated[int, Field(ge=1, le=MOST)]


class Part(BaseModel):
    """A group of keys of a recipe, such as `attention`. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def faults(cls, data: Any, prefix: str = "") -> list[str]:
        """Return a line for each error in plain data of this group: the key's path, the value, and what is
        valid.

        Args:
            data: the group as plain data, usually a dict.
            prefix: the path of the group, such as `attention.`.
        """
        try:
            cls.model_validate(data)
        except ValidationError as error:
            return [cls._fault(prefix, **fault) for fault in error.errors()]
        return []

    @classmethod
    def _fault(cls, prefix: str, type: str, loc: tuple, msg: str, input: Any, **other: Any) -> str:
        path, value = (prefix + ".".join(map(str, loc))).rstrip("."), reprlib.repr(input)
        if type == "missing":
            return f"{path}: missing"
        if type in ("extra_forbidden", "invalid_key"):
            known = cls._kinds(loc[:-1])[0].model_fields
            near = difflib.get_close_matches(str(loc[-1]), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            return f"{path}: unknown key ({hint})"
        kinds = cls._kinds(loc)
        if type == "model_type":
            return f"{path or 'recipe'}: {value} should have keys ({', '.join(kinds[0].model_fields)})"
        or_null = ", or null" if NoneType in kinds else ""
        return f"{path}: {value} {msg.removeprefix('Value error, ').removeprefix('Input ')}{or_null}"

    @classmethod
    def _kinds(cls, path: tuple) -> tuple:
        """Return the types that a value of this group may have.

        Args:
            path: the keys that lead from the group to the value.
        """
        kinds = (cls,)
        for key in path:
            kind = kinds[0].model_fields[key].annotation
            kinds = get_args(kind) or (kind,)
        return kinds


class Local(Part):
    """The local part: exact attention to nearby tokens.

    Attributes:
        scope: a sliding window over the last tokens, or consecutive groups of tokens.
        size: the number of tokens in the window or group.
        score: the name of the score function, such as softmax.
    """

    scope: Literal["sliding", "group"] = "sliding"
    size: Size = 64
    score: str = "softmax"


class Far(Part):
    """The linear part: older tokens enter a state of fixed size through a feature map.

    Attributes:
        feature_map: name of the feature map, or `FILE.py:CLASS` for the user's own.
        feature_dim: size of the feature map, if it has a choice. None uses the map's default.
        per_query_head: key features per query head instead of per KV head.
        key_weight: multiply the features of each key by a learned weight.
    """

    feature_map: str = "hedgehog"
    feature_dim: Dimension | None = None
    per_query_head: bool = False
    key_weight: bool = False


class Memory(Part):
    """The rule by which the state of the linear part forgets. `kind` is its name; `none` keeps all tokens."""

    kind: str = "none"


class Conv(Part):
    """The depthwise convolution over values. `width` is its number of taps; 0 means no convolution.

    It is causal if the attention is causal, else centred.
    """

    width: Width = 0


class Attention(Part):
    """The attention equation of a converted layer.

    Attributes:
        local: the local part. None: the method has none.
        far: the linear part. None: the method has none.
        memory: how the state of the linear part forgets.
        combine: the name of how the local and the linear part are joined (`shared`: by one normaliser).
        conv: the convolution over values.
        sinks: number of first tokens that stay in softmax attention at any distance (attention sinks).
        cross: attention of a decoder to an encoder: softmax, or linear through the feature map of `far`
            alone.
    """

    local: Local | None = None
    far: Far | None = None
    memory: Memory = Memory()
    combine: str = "shared"
    conv: Conv = Conv()
    sinks: Annotated[int, Field(ge=0, le=MOST)] = 0
    cross: Literal["softmax", "linear"] = "softmax"


class Stage(Part):
    """The options that both stages of training have.

    Attributes:
        warmup: share of the steps in which the learning rate rises. Then it falls to zero as a cosine.
        clip: maximum gradient norm over all trained parameters. None: no clipping.
        evaluate: share of the steps between two evaluations on held-out text. The parameters of the best
            evaluation are kept. 0: no evaluation, and the last parameters are kept.
        early_stop: number of evaluations without an improvement after which the stage ends. None: never.
        key: path of the learning rate's key, for messages.
    """

    key: ClassVar[str]
    warmup: Share = 0.1
    clip: Annotated[Number, Field(gt=0)] | None = 1.0
    evaluate: Share = 0.0
    early_stop: Size | None = None


class Transfer(Stage):
    """Attention transfer: each linear layer learns the output of the softmax layer that it replaces.

    Attributes:
        share: share of the training tokens. The rest is for distillation.
        lr: learning rate. `auto` is 1e-2 for heads of size 128, and scales with 1 / sqrt(head size).
        calibrate: set the decays of a memory that forgets from the distances at which the teacher attends,
            before anything is trained.
        window_dropout: probability that a step shortens the window of every layer at random, so that the
            linear part learns the tokens of the window too. It falls from this value at the first step to 0
            at the last.
        block_layers: number of layers on the device at a time. 0 or None: all.
        linear_lr: always None, because transfer trains only parameters that the conversion added.
    """

    share: Share = 0.4
    lr: Rate = 1e-2
    calibrate: bool = True
    window_dropout: Share = 0.0
    block_layers: Width | None = 0
    linear_lr: ClassVar[None] = None  # transfer trains linear parameters only
    key: ClassVar[str] = "recover.transfer.lr"


class Lora(Part):
    """Low-rank updates of the weights (LoRA).

    Attributes:
        rank: rank of the updates.
        alpha: the updates are multiplied by alpha / rank.
        targets: the Linear layers that get an update: all of the decoder layers that contain converted
            attention modules (`all`), or those of these modules alone (`attention`).
    """

    rank: Dimension = 8
    alpha: Number = 16.0
    targets: Literal["attention", "all"] = "all"


class Distill(Stage):
    """Distillation: the whole model learns the logits of the teacher.

    Attributes:
        lr: learning rate. `auto` falls with the width of the model.
        linear_lr: learning rate of the parameters that the conversion added. `auto` is three times `lr`.
            None: `lr`.
        kl: weight of the KL divergence from the logits of the teacher.
        ce: weight of the cross entropy of the next tokens.
        hidden: weight of the squared error of the last hidden states. Useful for classifiers, which have few
            logits.
        embedding: weight of the distance of the embeddings, 1 - cosine. Embedding models without weights of
            their own have 1 for it and for `hidden`.
        lora: the LoRA updates that are trained together with the parameters that the conversion added. None:
            every weight except embeddings and LM head is trained instead, with a frozen copy of the teacher.
        checkpointing: gradient checkpointing, which takes less memory and more time.
    """

    lr: Rate = "auto"
    linear_lr: Rate | None = None
    kl: Weight = 1.0
    ce: Weight = 0.0
    hidden: Weight = 0.0
    embedding: Weight = 0.0
    lora: Lora | None = Lora()
    checkpointing: bool = False
    key: ClassVar[str] = "recover.distill.lr"


class HeadStage(Stage):
    """The options of training Medusa heads. They are not a part of a recipe.

    Attributes:
        lr: learning rate. `auto` falls with the width of the model.
        decay: factor between the loss weights of a head and of the head before it.
        linear_lr: always None, because the model is frozen.
    """

    lr: Rate = "auto"
    decay: Number = 0.8
    linear_lr: ClassVar[None] = None  # the model is frozen
    key: ClassVar[str] = "--lr"


class Recover(Part):
    """The options of training: the number of tokens, the text, and the two stages.

    Attributes:
        tokens: number of training tokens of both stages together.
        data: name of the default training text: a Hub dataset, a file or a folder.
        separate_documents: mask attention between the documents of a block.
        assistant_only: train only on what the assistant says in a chat.
        transfer, distill: the options of the two stages.
    """

    tokens: Tokens = 40_000_000
    data: str = "HuggingFaceFW/fineweb-edu:sample-10BT"
    separate_documents: bool = False
    assistant_only: bool = False
    transfer: Transfer = Transfer()
    distill: Distill = Distill()


class Recipe(Part):
    """A method as data: its name, one-line summary and paper, its attention equation, and its training."""

    name: str
    summary: str = ""
    paper: str = ""
    attention: Attention = Attention()
    recover: Recover = Recover()

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, with every key."""
        return self.model_dump()

    def dump(self) -> str:
        """Return the recipe as YAML, with every key."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def with_budget(self, tokens: int | None = None, data: str | None = None) -> "Recipe":
        """Return the recipe with the number of tokens and the data of the command line. None or empty keeps
        the recipe's own.
        """
        given = {key: value for key, value in (("tokens", tokens), ("data", data)) if value}
        return self.model_copy(update={"recover": self.recover.model_copy(update=given)})


def names_code(feature_map: object) -> bool:
    """Return True if a feature map is the user's own Python code next to the recipe: `FILE.py:CLASS`."""
    return isinstance(feature_map, str) and ".py:" in feature_map


def transfer_rate(transfer: Transfer, head_dim: int) -> float:
    """Return the learning rate of transfer for keys of `head_dim` entries per head.

    `auto` is 1e-2 for 128 entries, and scales with 1 / sqrt(head_dim).
    """
    return 1e-2 * (128 / head_dim) ** 0.5 if transfer.lr == "auto" else transfer.lr


def learning_rates(distill: Distill, width: int) -> tuple[float, float | None]:
    """Return `lr` and `linear_lr` of distillation for a model with hidden states of `width` entries.

    `auto` is 2e-4 at width 4096 and grows as 1 / width, as Adam's rate should (arXiv 2203.03466), up to 2e-3. A
    loss on hidden states alone uses a third of this rate, because the full rate degrades embedding models.
    `auto` is three times the other rate for the parameters that the conversion added. `linear_lr` is None if
    these have no rate of their own.
    """
    rate = distill.lr
    if rate == "auto":
        rate = min(2e-3, 2e-4 * 4096 / width) / (1 if distill.kl or distill.ce else 3)
    return rate, 3 * rate if distill.linear_lr == "auto" else distill.linear_lr


def head_rate(stage: HeadStage, width: int) -> float:
    """Return the learning rate of Medusa heads for a model with hidden states of `width` entries.

    If the recipe says `auto`, it is 1e-3 (Medusa's) at width 4096, and scales with 1 / sqrt(width).
    """
    return 1e-3 * (4096 / width) ** 0.5 if stage.lr == "auto" else stage.lr

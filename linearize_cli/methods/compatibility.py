"""Which parts of a recipe go together: said when it is read, naming the keys."""

import math
from collections.abc import Iterable

from linearize_kernels.parts.combine import COMBINES
from linearize_kernels.parts.decay import MEMORIES
from linearize_kernels.parts.far import FAR_PARTS
from linearize_kernels.parts.feature_maps import FEATURE_MAPS
from linearize_kernels.parts.local_scores import SCORES, WEIGHTS

from linearize_cli.methods.recipe import Attention, Recipe, names_code

LINEAR = "linear"
REACHES = ("attention", "all")  # what LoRA may be on
MOST = 8192  # features, sinks or ranks: more would be as large as the cache or the weights they stand for


def misfits(recipe: Recipe) -> Iterable[str]:
    """Values that no part of the library goes by, and parts that do not go together."""
    a, r = recipe.attention, recipe.recover
    yield from unknown_values(a)
    at_least = [("attention.conv.width", a.conv.width, 0), ("attention.sinks", a.sinks, 0)]
    at_most = [("attention.sinks", a.sinks)]
    if a.local:
        at_least.append(("attention.local.size", a.local.size, 1))
    if a.far and a.far.feature_dim is not None:
        at_least.append(("attention.far.feature_dim", a.far.feature_dim, 1))
        at_most.append(("attention.far.feature_dim", a.far.feature_dim))
    if r.distill.lora:
        at_least.append(("recover.distill.lora.rank", r.distill.lora.rank, 1))
        at_most.append(("recover.distill.lora.rank", r.distill.lora.rank))
    for name, stage in (("transfer", r.transfer), ("distill", r.distill)):
        if stage.early_stop is not None:
            at_least.append((f"recover.{name}.early_stop", stage.early_stop, 1))
    at_least.append(("recover.transfer.block_layers", r.transfer.block_layers or 0, 0))
    for path, value, least in at_least:
        if value < least:
            yield f"{path}: {value} is less than {least}"
    for path, value in at_most:
        if value > MOST:
            yield f"{path}: {value} is more than {MOST}"
    if not a.local and not a.far:
        yield "attention: neither local nor far: nothing would be attended to"
    else:
        yield from parts_at_odds(a)
    if r.tokens < 1:
        yield f"recover.tokens: {r.tokens} is less than 1"
    yield from unfit_training(recipe)


def unfit_training(recipe: Recipe) -> Iterable[str]:
    a, r = recipe.attention, recipe.recover
    shares = {"transfer.share": r.transfer.share, "transfer.window_dropout": r.transfer.window_dropout}
    rates = {"recover.transfer.lr": r.transfer.lr, "recover.distill.lr": r.distill.lr}
    if r.distill.linear_lr is not None:
        rates["recover.distill.linear_lr"] = r.distill.linear_lr
    for name, stage in (("transfer", r.transfer), ("distill", r.distill)):
        shares |= {f"{name}.warmup": stage.warmup, f"{name}.evaluate": stage.evaluate}
        if stage.clip is not None and not stage.clip > 0:
            yield f"recover.{name}.clip: {stage.clip} is no length of a gradient; null: any"
        if stage.early_stop is not None and not stage.evaluate:
            yield f"recover.{name}.early_stop, recover.{name}.evaluate: without looks at held-out text nothing stops"
    for name, share in shares.items():
        if not 0 <= share <= 1:
            yield f"recover.{name}: {share} is not between 0 and 1"
    if r.transfer.window_dropout and not (a.local and a.far):
        yield "recover.transfer.window_dropout: there is no window, or no far part that would learn without it"
    if r.distill.lora and r.distill.lora.targets not in REACHES:
        yield f"recover.distill.lora.targets: {r.distill.lora.targets!r} is none of {', '.join(REACHES)}"
    for path, rate in rates.items():
        if isinstance(rate, str) and rate != "auto":
            yield f"{path}: {rate!r} is neither a number nor auto"
        elif not isinstance(rate, str) and not 0 < rate < math.inf:
            yield f"{path}: {rate} is no learning rate"
    losses = {name: getattr(r.distill, name) for name in ("kl", "ce", "hidden")}
    for name, weight in losses.items():
        if not 0 <= weight < math.inf:
            yield f"recover.distill.{name}: {weight} is no weight of a loss"
    if not any(losses.values()):
        yield "recover.distill.kl, recover.distill.ce: both are 0: nothing would be learned"


def unknown_values(a: Attention) -> Iterable[str]:
    choices = [
        ("attention.combine", a.combine, COMBINES),
        ("attention.memory.kind", a.memory.kind, MEMORIES),
        ("attention.cross", a.cross, ("softmax", LINEAR)),
    ]
    if a.local:
        choices.append(("attention.local.scope", a.local.scope, ("sliding", "group")))
        choices.append(("attention.local.score", a.local.score, SCORES))
    if a.far and not names_code(a.far.feature_map):
        choices.append(("attention.far.feature_map", a.far.feature_map, [*FEATURE_MAPS, *FAR_PARTS]))
    for path, value, allowed in choices:
        if value not in allowed:
            yield f"{path}: {value!r} is none of {', '.join(allowed)}"


def parts_at_odds(a: Attention) -> Iterable[str]:
    positive = a.far and getattr(FEATURE_MAPS.get(a.far.feature_map), "positive", False)
    if a.cross == LINEAR and not (positive or (a.far and names_code(a.far.feature_map))):
        yield (
            "attention.cross, attention.far.feature_map: linear attention to an encoder needs a feature map whose "
            "weights are positive"
        )
    local, far, score = a.local is not None, a.far is not None, a.local.score if a.local else None
    weight = score in WEIGHTS
    if weight and a.combine not in ("none", "rms"):
        yield f"attention.local.score, attention.combine: {score} is a weight, not a logit: {a.combine} needs softmax"
    if local and not weight and a.combine in ("none", "rms"):
        yield (
            f"attention.local.score, attention.combine: {score} scores need a normaliser, which {a.combine} lacks: "
            "shared, lolcats or gate"
        )
    if a.combine in ("lolcats", "gate") and not (local and far):
        yield f"attention.combine: {a.combine} joins a local and a far part; one is missing"
    if a.sinks and score != "softmax":
        yield "attention.sinks: sinks are tokens of the local softmax part, which is missing"
    kind = a.memory.kind
    if kind != "none" and not far:
        yield f"attention.memory.kind, attention.far: {kind} is how the far part forgets; there is none"
    if far and kind != "none" and a.far.feature_map in FAR_PARTS:
        yield f"attention.memory.kind, attention.far.feature_map: {a.far.feature_map} has a memory of its own"
    if far and a.far.key_weight and (kind == "delta" or a.far.feature_map in FAR_PARTS):
        yield (
            "attention.far.key_weight, attention.far.feature_map, attention.memory.kind: "
            f"{'delta' if kind == 'delta' else a.far.feature_map} sets the weight of a key by itself"
        )
    if kind == "delta" and a.combine in ("shared", "lolcats"):
        yield f"attention.memory.kind, attention.combine: delta leaves no mass for the normaliser of {a.combine}"
    if kind == "delta" and weight and a.local.scope == "group":
        yield (
            "attention.memory.kind, attention.local.score, attention.local.scope: delta rewrites the state token by "
            f"token; {score} within groups folds whole groups (FLASH)"
        )
    if far and a.combine in ("shared", "lolcats"):
        feature_map = FEATURE_MAPS.get(a.far.feature_map)
        if feature_map is not None and not feature_map.positive:
            yield (
                f"attention.far.feature_map, attention.combine: {a.far.feature_map} features give negative weights: "
                f"{a.combine} needs positive ones"
            )
        if feature_map is None and local and a.far.feature_map in FAR_PARTS:
            yield (
                f"attention.far.feature_map, attention.combine: {a.far.feature_map} has a normaliser of its own: "
                "join it with a local part by gate"
            )


def forward_only(a: Attention) -> str | None:
    """The key of a part that only runs forward in time, which no encoder's attention does; None: there is none."""
    return "attention.memory.kind" if MEMORIES[a.memory.kind].forward_in_time else None

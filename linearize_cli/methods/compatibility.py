"""The rules between the keys of a recipe: which named parts exist, and which of them fit together."""

from collections.abc import Iterator

from linearize_kernels.parts.combine import COMBINES
from linearize_kernels.parts.decay import MEMORIES
from linearize_kernels.parts.far import FAR_PARTS
from linearize_kernels.parts.feature_maps import FEATURE_MAPS
from linearize_kernels.parts.local_scores import SCORES, WEIGHTS

from linearize_cli.methods.recipe import Attention, Recipe, Recover, names_code

SUMS = ("shared", "lolcats")  # combines with one normaliser over local and far weights
UNNORMALISED = ("none", "rms")


def misfits(recipe: Recipe) -> list[str]:
    """Return a line for each error of a recipe: a part that the library does not have, or a broken rule
    between keys.

    Each line begins with the paths of the keys. A valid recipe gives an empty list.
    """
    attention = recipe.attention
    unknown = unknown_parts(attention)
    rules = [*training_rules(attention, recipe.recover)]
    if not unknown:  # the rules look the parts up
        rules += attention_rules(attention)
    return unknown + [f"{keys}: {reason}" for broken, keys, reason in rules if broken]


def unknown_parts(a: Attention) -> list[str]:
    """Return a line for each key of an attention part that names a part which the library does not have."""
    choices = [
        ("attention.combine", a.combine, COMBINES),
        ("attention.memory.kind", a.memory.kind, MEMORIES),
    ]
    if a.local:
        choices.append(("attention.local.score", a.local.score, SCORES))
    if a.far and not names_code(a.far.feature_map):
        choices.append(("attention.far.feature_map", a.far.feature_map, [*FEATURE_MAPS, *FAR_PARTS]))
    return [
        f"{key}: {value!r} is none of {', '.join(known)}"
        for key, value, known in choices
        if value not in known
    ]


def attention_rules(a: Attention) -> Iterator[tuple[object, str, str]]:
    """Yield the rules between the parts of an attention equation.

    Each rule is `(broken, keys, reason)`: `broken` is true if the recipe breaks the rule, `keys` are the
    paths of the keys involved, and `reason` explains the rule.
    """
    local, far, combine, memory = a.local, a.far, a.combine, a.memory.kind
    score = local and local.score
    weight = score in WEIGHTS
    features = far and far.feature_map
    feature_map = FEATURE_MAPS.get(features)  # None for a running projection and for code that was not run
    positive = feature_map is not None and feature_map.positive
    projection = features in FAR_PARTS

    yield not local and not far, "attention", "local and far are both null: nothing would be attended to"
    yield (
        a.cross == "linear" and not (positive or names_code(features)),
        "attention.cross, attention.far.feature_map",
        "linear attention to an encoder needs a feature map with positive weights",
    )
    yield (
        weight and combine not in UNNORMALISED,
        "attention.local.score, attention.combine",
        f"{score} is a weight and not a logit: {combine} needs softmax",
    )
    yield (
        local and not weight and combine in UNNORMALISED,
        "attention.local.score, attention.combine",
        f"{score} scores need a normaliser, which {combine} lacks: use shared, lolcats or gate",
    )
    yield (
        combine in ("lolcats", "gate") and not (local and far),
        "attention.combine",
        f"{combine} joins a local and a far part, and one of them is null",
    )
    yield (
        a.sinks and score != "softmax",
        "attention.sinks",
        "sinks are tokens of the local softmax part, which this recipe lacks",
    )
    yield (
        memory != "none" and not far,
        "attention.memory.kind, attention.far",
        f"{memory} is how the far part forgets, and far is null",
    )
    yield (
        memory != "none" and projection,
        "attention.memory.kind, attention.far.feature_map",
        f"{features} has a memory of its own",
    )
    yield (
        far and far.key_weight and (memory == "delta" or projection),
        "attention.far.key_weight, attention.far.feature_map, attention.memory.kind",
        f"{'delta' if memory == 'delta' else features} sets the weight of a key by itself",
    )
    yield (
        memory == "delta" and combine in SUMS,
        "attention.memory.kind, attention.combine",
        f"delta leaves no mass for the normaliser of {combine}",
    )
    yield (
        memory == "delta" and weight and local.scope == "group",
        "attention.memory.kind, attention.local.score, attention.local.scope",
        f"delta updates the state token by token, and {score} within groups updates it once per group",
    )
    yield (
        combine in SUMS and feature_map is not None and not positive,
        "attention.far.feature_map, attention.combine",
        f"{features} features give negative weights, and {combine} needs positive ones",
    )
    yield (
        combine in SUMS and projection and local,
        "attention.far.feature_map, attention.combine",
        f"{features} has a normaliser of its own: join it with a local part by gate",
    )


def training_rules(a: Attention, r: Recover) -> Iterator[tuple[object, str, str]]:
    """Yield the rules of training as `(broken, keys, reason)`: the recipe breaks a rule if its first entry is
    true.
    """
    for name in ("transfer", "distill"):
        stage = getattr(r, name)
        yield (
            stage.early_stop is not None and not stage.evaluate,
            f"recover.{name}.early_stop, recover.{name}.evaluate",
            "early stopping needs evaluations: set evaluate above 0",
        )
    yield (
        r.transfer.window_dropout and not (a.local and a.far),
        "recover.transfer.window_dropout",
        "it needs a local part to shorten and a far part that learns the rest",
    )
    yield (
        not (r.distill.kl or r.distill.ce or r.distill.hidden or r.distill.embedding),
        "recover.distill.kl, recover.distill.ce",
        "both are 0: nothing would be learned",
    )

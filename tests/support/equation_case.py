"""Equations with random parameters that join every part, and their tokens in fp64."""

import torch
from linearize_kernels import Equation, LinearAttention, step, step_state

BASE = dict(heads=4, kv_heads=2, key_dim=6, value_dim=5, scale=0.4)
SLIDING = dict(scope="sliding", size=5, score="softmax")
FORMS = {
    "augmented": dict(SLIDING, feature_map="hedgehog", feature_dim=7, key_weight=True, conv_width=4, sinks=3),
    "conv beyond the window": dict(SLIDING, feature_map="hedgehog", conv_width=9, sinks=2),
    "group": dict(SLIDING, scope="group", feature_map="hedgehog", conv_width=3, sinks=2),
    "flash augmented": dict(
        scope="group", size=4, score="relu2", feature_map="identity", combine="none", conv_width=6
    ),
    "flash-local": dict(scope="group", size=4, score="relu2", combine="none"),
    "lolcats": dict(SLIDING, feature_map="hedgehog", per_query_head=True, combine="lolcats"),
    "linear": dict(feature_map="hedgehog"),
    "relu": dict(feature_map="relu"),
    "window": dict(SLIDING, sinks=3),
    "softcap": dict(SLIDING, feature_map="hedgehog", sinks=1, softcap=2.0),
    "window of one": dict(SLIDING, size=1, feature_map="hedgehog", conv_width=2),
    "position bias": dict(SLIDING, feature_map="relu", sinks=2, bias=True),
    "decay": dict(SLIDING, feature_map="hedgehog", memory="decay", conv_width=3, sinks=2),
    "gated in groups": dict(SLIDING, scope="group", feature_map="elu", memory="gated", conv_width=8),
    "gated per query head": dict(
        SLIDING, feature_map="hedgehog", per_query_head=True, memory="gated", combine="lolcats"
    ),
    "delta": dict(SLIDING, feature_map="identity", memory="delta", combine="gate", conv_width=9, sinks=2),
    "gated-delta": dict(feature_map="identity", memory="delta", combine="rms"),
    "delta in groups": dict(SLIDING, scope="group", feature_map="linear", memory="delta", combine="gate"),
    "weighted keys that fade": dict(
        SLIDING, feature_map="elu", per_query_head=True, key_weight=True, memory="gated", sinks=1
    ),
    "retention": dict(feature_map="linear", memory="decay", combine="rms"),
    "mamba2": dict(feature_map="linear", memory="gated", combine="rms", conv_width=3),
    "gla": dict(feature_map="linear", memory="gated-channels", combine="rms"),
    "channels that fade, weighted keys": dict(
        SLIDING, feature_map="hedgehog", key_weight=True, memory="gated-channels", conv_width=9, sinks=2
    ),
    "channels per query head": dict(
        SLIDING, scope="group", feature_map="elu", per_query_head=True, memory="gated-channels"
    ),
    "kda": dict(feature_map="identity", memory="delta-channels", combine="rms"),
    "kda beside a window": dict(
        SLIDING, feature_map="linear", memory="delta-channels", combine="gate", sinks=1
    ),
    "lightning": dict(feature_map="silu", memory="decay", combine="rms"),
    "based": dict(SLIDING, feature_map="taylor", feature_dim=4, sinks=1),
    "performer": dict(SLIDING, feature_map="performer", feature_dim=9),
    "transnormer": dict(feature_map="elu", combine="rms"),
    "yoso": dict(SLIDING, feature_map="yoso", feature_dim=48, combine="gate", sinks=1),
    "yoso-e": dict(SLIDING, score="yoso", feature_map="yoso", feature_dim=32, combine="rms"),
    "linformer": dict(feature_map="linformer", feature_dim=3),
    "augmented linformer": dict(
        SLIDING,
        feature_map="linformer",
        feature_dim=4,
        per_query_head=True,
        combine="gate",
        conv_width=7,
        sinks=2,
    ),
}
FORWARD_ONLY = [name for name, form in FORMS.items() if form.get("memory", "none") != "none"]


def make(name: str, seed: int = 0, **changes) -> LinearAttention:
    """A layer whose every parameter is random: nothing hides behind a zero."""
    torch.manual_seed(seed)
    attention = LinearAttention(Equation(**{**BASE, **FORMS[name], **changes})).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return attention


def tokens(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    def normal(heads: int, size: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, size, dtype=torch.float64) + 0.2

    return (
        normal(BASE["heads"], BASE["key_dim"]),
        normal(BASE["kv_heads"], BASE["key_dim"]),
        normal(BASE["kv_heads"], BASE["value_dim"]),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def chain(attention, q, k, v, sink_logits=None):
    """Return the outputs `[heads, T, Dv]` of `step` for one row's tokens, and the last state."""
    outputs, states = branches(attention, q, k, v, range(-1, q.shape[-2] - 1), sink_logits)
    return outputs, states[-1]


def branches(attention, q, k, v, parents, sink_logits=None):
    """Run `step` on one row's tokens `[heads, T, D]`, each from the state of its parent.

    Args:
        parents: the index of each token's parent, -1 for the empty state.

    Returns:
        The outputs `[heads, T, Dv]` and the state after each token.
    """
    states, outputs = [], []
    for t, parent in enumerate(parents):
        before = step_state(attention) if parent < 0 else states[parent]
        out, state = step(attention, before, q[:, t], k[:, t], v[:, t], sink_logits)
        outputs.append(out)
        states.append(state)
    return torch.stack(outputs, 1), states

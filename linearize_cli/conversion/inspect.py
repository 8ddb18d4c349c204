"""`inspect`: list the layers of a model that can be converted, and the memory that this saves."""

from typing import Any

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.conversion.layer_selection import plan_layers
from linearize_cli.methods.registry import load_recipe
from linearize_cli.metrics.memory import kv_bytes_per_token
from linearize_cli.models.load import load_stored
from linearize_cli.runtime.layer import LinearizedAttention, equation

METHOD = "augmented"
CONTEXTS = (1_000, 4_000, 32_000, 128_000)


def inspect(
    model: str, *, device: str = "auto", dtype: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """List the attention layers of a model, with the reason if a layer cannot be converted, and the memory of
    a sequence.

    Returns:
        the report: the layers, and the bytes of keys and values and of states at some context lengths, for
            the default method.

    Raises:
        UserError: the model cannot be loaded, or no layer calls transformers' attention interface.
    """
    refuse_linearized(model)
    teacher, _ = load_stored(model, dtype, device, trust_remote_code)
    layers = plan_layers(teacher)
    attention = load_recipe(METHOD).to_dict()["attention"]
    linear = [layer for layer in layers if layer.refusal is None]
    softmax = [layer for layer in layers if layer.refusal is not None]
    state = sum(
        LinearizedAttention(equation(attention, layer.geometry)).empty_state(1, "cpu", teacher.dtype).nbytes()
        for layer in linear
        if layer.causal
    )
    every, kept = (kv_bytes_per_token(chosen, teacher.dtype) for chosen in (layers, softmax))
    return {
        "model": model,
        "class": type(teacher).__name__,
        "method": METHOD,
        "layers": [
            {
                "name": layer.name,
                "attention": type(teacher.get_submodule(layer.name)).__name__,
                "geometry": layer.geometry,
                "refusal": layer.refusal,
            }
            for layer in layers
        ],
        "kv_bytes_per_token": every,
        "state_bytes": state,
        "memory": [{"context": n, "kv_bytes": every * n, "state_bytes": state + kept * n} for n in CONTEXTS],
    }

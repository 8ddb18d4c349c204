"""The differences between the versions of transformers that this package supports, 5.17 to 5.23."""

import transformers

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # 5.17

    class DummyLayer:  # type: ignore[no-redef]
        """A cache layer of an attention layer that has no cache of its own. Caches of this version have none."""


NEWEST = (5, 23)
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
WRONG_BEFORE_NEWEST = {  # by model type: what transformers 5.17 computes wrongly in the base model
    **dict.fromkeys(
        ("gemma2", "vaultgemma", "t5gemma"), "it leaves out the soft cap of the attention scores"
    ),
    **dict.fromkeys(("big_bird", "megatron-bert", "rembert"), "as a decoder, it sees later tokens"),
    "git": "with a cache, its positions are wrong",
}


def fault(model_type: str, causal: bool) -> str | None:
    """Return what the installed transformers computes wrongly in a base model, or None.

    Args:
        model_type: the base model's type.
        causal: True for a decoder.
    """
    found = WRONG_BEFORE_NEWEST.get(model_type) if VERSION < NEWEST else None
    return None if found and "decoder" in found and not causal else found

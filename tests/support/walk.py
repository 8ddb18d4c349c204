"""Every causal language model type of transformers, built tiny, and what becomes of it: converted and checked,
refused with the reason, or not built.

`python tests/support/walk.py walk.json` writes the outcomes that `examples/support_table.py` turns into a table.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from families import CONVERTED, EXPERTS, GPT, HEAD, LATENT, REFUSED, SMALL, swap
from forms import LENGTH, PADS, check_gradients, check_wide_window, padded_tokens, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize_cli.errors import UserError
from linearize_cli.metrics.equivalence import difference, finite_max
from linearize_cli.models.decoding import forward, unpadded
from linearize_cli.runtime.dispatch import attention_implementation

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Names of windows, made wider than any sequence here: softmax in a window that sees all is then the base model.
WINDOWS = dict(sliding_window=64, attention_chunk_size=64, window_size=64, attention_window_size=64)
# What a config gets of these is what its default has an attribute for.
GENERIC = {
    **{**SMALL, **GPT, **HEAD, **EXPERTS, **LATENT, **WINDOWS},
    **dict.fromkeys(("n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("n_heads", "num_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "mamba_n_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("d_model", "embedding_size", "emb_dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("input_hidden_size", "cross_attention_hidden_size", "mamba_d_ssm"), 32),
    **dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dff", "d_inner"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("vocab_size_per_layer_input", "decoder_vocab_size"), 99),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("index_head_dim", "global_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict(rotary_dim=4, linear_num_value_heads=4, is_decoder=True, sep_token_id=2, mamba_n_groups=1),
    **dict(decoder_start_token_id=1, n_shared_experts=1, laurel_rank=4, shared_intermediate_size=24),
}
HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a type needs beyond GENERIC.
OVERRIDES: dict[str, dict] = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    **dict.fromkeys(
        ("blt_patcher", "blt_local_encoder", "blt_local_decoder", "blt_global_transformer"), dict(head_dim=8)
    ),
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROPE}),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=24, hidden_size=32),
    ),
    "dots3_note_vision_encoder": dict(adapter_in_dim=32, adapter_out_dim=32),
    "dots3_note_audio_encoder": dict(adapter_input_size=32, adapter_output_size=32),
    "granitemoehybrid": HYBRID,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1),
    "nemotron_h": dict(mamba_num_heads=4, n_groups=1, moe_shared_expert_intermediate_size=24),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=12, indexer_budget=8, indexer_compress_ratio=2
    ),
    "reformer": dict(axial_pos_embds=False, attn_layers=["local", "lsh"] * 2),
    "xlstm": dict(num_blocks=2, num_heads=4),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}
KNOWN = {kind: own for kind, own in reversed((*REFUSED.values(), *CONVERTED.values()))}
KNOWN["bert"] = dict(is_decoder=True)
KNOWN["gemma4_unified_text"] = KNOWN["gemma4_text"]


@dataclass
class Outcome:
    """The outcome of one model type.

    Attributes:
        outcome: unbuilt, no softmax, converted, refused, or failed (a check of the converted model).
        detail: why not; of a converted one, why some of its layers stay softmax.
    """

    model_type: str
    outcome: str
    detail: str = ""


def tiny_config(model_type: str) -> PreTrainedConfig:
    return shrunk(CONFIG_MAPPING[model_type])


def shrunk(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The config that the families' tests use, else one of GENERIC values, its sub-configs likewise; lists with
    one entry a layer keep an entry of each kind.
    """
    own = KNOWN.get(cls.model_type)
    if own is not None:
        return cls(**{**SMALL, **own, **{name: size for name, size in WINDOWS.items() if name in own}})
    changes = OVERRIDES.get(cls.model_type, {})
    default = cls()
    values = {name: value for name, value in GENERIC.items() if settable(default, name)}
    if "kv_lora_rank" in values:
        values |= {**LATENT, "head_dim": LATENT["qk_rope_head_dim"]}
    layers = getattr(default, "num_hidden_layers", None)
    for name, value in vars(default).items():
        if isinstance(value, list) and len(value) == layers and isinstance(value[0], str):
            values[name] = (list(dict.fromkeys(value)) * 4)[:4]
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = shrunk(type(part)).to_dict()
    return cls(**{**values, **changes})


def settable(config: PreTrainedConfig, name: str) -> bool:
    """Return True if a config has an own attribute of this name that takes another value."""
    try:
        if not hasattr(config, name):
            return False
        setattr(config, name, getattr(config, name))
    except Exception:
        return False
    return True


class SoftmaxSeen(TorchDispatchMode):
    """Notes whether a softmax (Reformer's: a logsumexp) over `length` keys is computed."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.seen = length, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        attends = "scaled_dot_product" in name and args[0].shape[-2] == self.length
        scores = (
            ("_softmax" in name or "logsumexp" in name)
            and args[0].dim() >= 3
            and args[0].shape[-1] >= self.length
        )
        self.seen = self.seen or attends or scores
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def has_softmax(model: PreTrainedModel) -> bool:
    """Return True if a forward of 29 tokens computes softmax over 29 of them. No other size in a tiny model is 29."""
    with SoftmaxSeen(29) as mode:
        model(tokens(1, 29), use_cache=False)
    return mode.seen


def walk(model_type: str) -> Outcome:
    """Build one type, convert it, and check it."""
    try:
        model = fresh(model_type)
        softmax = has_softmax(model)
    except Exception as error:
        return Outcome(model_type, "unbuilt", first_line(error))
    if not softmax:
        return Outcome(model_type, "no softmax")
    try:
        native = model.config._attn_implementation
        _, kept = swap(model)
        notes = sorted({layer.refusal for layer in kept}) + check_forms(model, native)
        check_gradients(model)
        check_wide_window(fresh(model_type))
    except UserError as error:
        return Outcome(model_type, "refused", reason(error))
    except Exception as error:
        return Outcome(model_type, "failed", first_line(error))
    return Outcome(model_type, "converted", "; ".join(notes))


def check_forms(model: PreTrainedModel, native: str) -> list[str]:
    """One forward == token by token == uneven pieces, and a row behind pads == the row alone, with a cache too;
    within 1e-5 of the largest logit, 1e-4 where native recurrent layers are.

    A form that the base model itself lacks, with its softmax in place of ours, is not asked for. Up to twice
    the tolerance is rounding where the same model in fp64 is within 1e-12.

    Returns:
        The forms that the base model lacks, and those where rounding exceeds the tolerance.
    """
    layers = DynamicCache(config=model.config).layers
    tolerance = 1e-4 if any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers) else 1e-5
    found = deviations(model)
    lacking = []
    if any(not deviation <= tolerance for deviation in found.values()):
        with attention_implementation(model, native):
            lacking = [form for form, deviation in deviations(model).items() if not deviation <= tolerance]
    wrong = {form: x for form, x in found.items() if not x <= tolerance and form not in lacking}
    if wrong:
        exact = deviations(model.double())
        model.float()
        assert all(wrong[form] < 2 * tolerance and exact[form] < 1e-12 for form in wrong), (wrong, exact)
    assert len(lacking) < len(found) - 1, lacking
    rounding = [f"within {2 * tolerance:.0e}, and fp64 within 1e-12, {form}" for form in wrong]
    return [f"the base model itself differs {form}" for form in lacking] + rounding


@torch.no_grad()
def deviations(model: PreTrainedModel) -> dict[str, float]:
    """Largest logit differences between the forms of a model, relative to the largest logit."""
    ids = tokens()
    full = forward(model, ids)
    scale = max(1.0, finite_max(full))
    assert full.isfinite().all() and full.std() > 0.02
    padded, mask = padded_tokens()
    alone = unpadded(model, padded[0, PADS:], PADS)

    def fed(ids: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
        cache, outputs, end = DynamicCache(config=model.config), [], 0
        for part in ids.split(sizes, 1):
            end += part.shape[1]
            outputs.append(forward(model, part, cache, None if mask is None else mask[:, :end]))
        return torch.cat(outputs, 1)

    pairs = {
        "token by token": (fed(ids, [1] * LENGTH), full),
        "in a prefill and tokens": (fed(ids, [11] + [1] * (LENGTH - 11)), full),
        "in pieces": (fed(ids, [11, 1, 5, 13]), full),
        "behind pads": (forward(model, padded, mask=mask)[0, PADS:], alone),
        "behind pads with a cache": (fed(padded, [12] + [1] * (LENGTH - 12), mask)[0, PADS:], alone),
    }
    return {form: difference(actual, expected) / scale for form, (actual, expected) in pairs.items()}


def fresh(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()


def reason(error: UserError) -> str:
    """The reason of the first layer, or of the model."""
    head, _, layers = str(error).partition("\n")
    return layers.splitlines()[0].partition(": ")[2] if layers.startswith("  ") else head


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def main(path: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = []
    for model_type in TYPES:
        outcomes.append(walk(model_type))
        print(*asdict(outcomes[-1]).values(), flush=True)
    print(Counter(outcome.outcome for outcome in outcomes))
    Path(path).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


if __name__ == "__main__":
    main(sys.argv[1])

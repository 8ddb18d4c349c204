"""Tiny random models of decoder-only families, and their conversion."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from linearize_cli.conversion.layer_selection import choose_layers, copy_biases, plan_layers
from linearize_cli.models.layer import Layer
from linearize_cli.runtime import linearize

SMALL = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(n_embd=32, n_inner=48, n_layer=4, n_head=4, n_positions=256)
HEAD = dict(head_dim=12)
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
)
SLIDING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)
NATIVE_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
LOCAL = [[["global", "local"], 2]]
SHARED_KV = dict(  # layers 2 and 3 store keys and values for 4 and 5
    num_hidden_layers=6,
    num_kv_shared_layers=2,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention"] * 3,
    vocab_size_per_layer_input=99,
    hidden_size_per_layer_input=8,
)

# Family -> its transformers model type, and what its config needs beyond SMALL.
CONVERTED: dict[str, tuple[str, dict]] = {
    "apertus": ("apertus", {}),
    "bert": ("bert", dict(is_decoder=True)),
    "big-bird": ("big_bird", dict(is_decoder=True, attention_type="original_full")),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", GPT),
    "codegen": ("codegen", dict(GPT, rotary_dim=4)),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", SLIDING),
    "deepseek-v2": ("deepseek_v2", {**EXPERTS, **LATENT}),
    "deepseek-v3": ("deepseek_v3", {**EXPERTS, **LATENT}),
    "deepseek-v3.2": ("deepseek_v32", dict(index_n_heads=2, index_head_dim=16, **EXPERTS, **LATENT)),
    "diffllama": ("diffllama", {}),
    "ernie4.5": ("ernie4_5", HEAD),
    "ernie4.5-moe": ("ernie4_5_moe", EXPERTS),
    "exaone4": ("exaone4", SLIDING),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", dict(alibi=True, multi_query=False)),
    "falcon-h1": ("falcon_h1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, **HEAD)),
    "falcon-new": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", dict(query_pre_attn_scalar=9, attn_logit_softcapping=2.0, **HEAD, **SLIDING)),
    "gemma3": ("gemma3_text", dict(query_pre_attn_scalar=9, **HEAD, **SLIDING)),
    "gemma3n": ("gemma3n_text", dict(laurel_rank=4, activation_sparsity_pattern=None, **HEAD, **SHARED_KV)),
    "gemma4": ("gemma4_text", dict(global_head_dim=16, **HEAD, **SHARED_KV)),
    "glm": ("glm", HEAD),
    "glm4": ("glm4", HEAD),
    "glm4-moe": ("glm4_moe", {**EXPERTS, **HEAD}),
    "gpt-bigcode": ("gpt_bigcode", GPT),
    "gpt-j": ("gptj", dict(GPT, rotary_dim=4)),
    "gpt-neo": ("gpt_neo", dict(num_layers=4, num_heads=4, window_size=64, attention_types=LOCAL)),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox-japanese": ("gpt_neox_japanese", {}),
    "gpt-oss": (
        "gpt_oss",
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **HEAD, **EXPERTS, **SLIDING),
    ),
    "gpt2": ("gpt2", GPT),
    "granite": ("granite", dict(attention_multiplier=0.3)),
    "granite-moe": ("granitemoe", dict(attention_multiplier=0.3, **EXPERTS)),
    "helium": ("helium", dict(head_dim=8)),
    "hunyuan": ("hunyuan_v1_dense", HEAD),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"] * 2)),
    "llama": ("llama", {}),
    "llama4": (
        "llama4_text",
        dict(
            intermediate_size_mlp=48,
            attention_chunk_size=6,
            layer_types=["chunked_attention", "full_attention"] * 2,
            **HEAD,
            **EXPERTS,
        ),
    ),
    "megatron-bert": ("megatron-bert", dict(is_decoder=True)),
    "minicpm3": ("minicpm3", LATENT),
    "mistral": ("mistral", dict(sliding_window=6)),
    "mixtral": ("mixtral", EXPERTS),
    "modernbert-decoder": ("modernbert-decoder", {}),
    "mpt": ("mpt", dict(d_model=32, n_heads=4, n_layers=4, max_seq_len=256)),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo-hybrid": ("olmo_hybrid", NATIVE_LINEAR),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "olmoe": ("olmoe", EXPERTS),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "phi": ("phi", {}),
    "phi3": ("phi3", dict(sliding_window=6)),
    "phimoe": ("phimoe", EXPERTS),
    "qwen2": ("qwen2", dict(use_sliding_window=True, **SLIDING)),
    "qwen2-moe": ("qwen2_moe", EXPERTS),
    "qwen3": ("qwen3", HEAD),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, **HEAD}),
    "qwen3-next": ("qwen3_next", {**NATIVE_LINEAR, **EXPERTS, **HEAD}),
    "rembert": ("rembert", dict(is_decoder=True, input_embedding_size=32, output_embedding_size=32)),
    "seed-oss": ("seed_oss", HEAD),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", dict(sliding_window=6)),
    "vaultgemma": ("vaultgemma", dict(query_pre_attn_scalar=9, **HEAD, **SLIDING)),
    "xglm": ("xglm", dict(d_model=32, ffn_dim=48, num_layers=4, attention_heads=4)),
}
REFUSED: dict[str, tuple[str, dict]] = {
    "bert-encoder": ("bert", {}),
    "doge": ("doge", {}),
    "inkling": ("inkling_text", {**EXPERTS, **HEAD}),
    "mamba": ("mamba", {}),
    "zamba2": (
        "zamba2",
        dict(layers_block_type=["linear_attention", "hybrid"] * 2, mamba_d_state=8, n_mamba_heads=4),
    ),
}
AUGMENTED = {
    "local": {"scope": "sliding", "size": 8, "score": "softmax"},
    "far": {"feature_map": "hedgehog", "feature_dim": 8},
    "combine": "shared",
    "conv": {"width": 4},
    "sinks": 2,
}

SENSITIVE = ("gemma4",)  # its layers make more of a rounding than 1e-5, on some machines


def tiny_model(family: str, **changes) -> PreTrainedModel:
    """A random model of the family, in eval mode; changes go to its config."""
    model_type, own = {**CONVERTED, **REFUSED}[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **own, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def swapped(family: str, attention: dict = AUGMENTED, keep: int = 0, **changes) -> PreTrainedModel:
    """A converted tiny model; see `swap`."""
    model = tiny_model(family, **changes)
    swap(model, attention, keep)
    return model


def swap(
    model: PreTrainedModel, attention: dict = AUGMENTED, keep: int = 0
) -> tuple[list[Layer], list[Layer]]:
    """Convert a model in place; of the layers that could be converted, the last `keep` stay softmax. Every
    parameter is moved away from its start, so that none is zero and attention is not uniform; a position bias
    stays the base model's.

    Returns:
        The linear layers and those that stay softmax.
    """
    linear, softmax = choose_layers(plan_layers(model))
    linear, softmax = linear[: len(linear) - keep], softmax + linear[len(linear) - keep :]
    linearize(
        model,
        {
            "base_class": type(model).__name__,
            "base_model_type": model.config.model_type,
            "method": "test",
            "attention": attention,
            "layers": {layer.name: layer.geometry for layer in linear},
            "softmax": [layer.name for layer in softmax],
        },
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    copy_biases(model, linear)
    return linear, softmax

"""Tiny random encoders and encoder-decoders, their tokenizer, and their conversion."""

import torch
import transformers
from families import AUGMENTED
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from linearize_cli.conversion.layer_selection import choose_layers, copy_biases, plan_layers
from linearize_cli.runtime import linearize

SPECIAL = ["<s>", "<pad>", "</s>", "<mask>", "<unk>"]
SENTINELS = [f"<extra_id_{i}>" for i in range(20)]
WORDS = [f"word{i}" for i in range(59)]
IDS = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)
BERT = dict(
    vocab_size=len(SPECIAL + SENTINELS + WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=130,
    num_labels=3,
    **IDS,
)
BART = dict(
    vocab_size=BERT["vocab_size"],
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=130,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
    **IDS,
)
T5 = dict(
    vocab_size=BERT["vocab_size"],
    d_model=32,
    d_ff=48,
    d_kv=8,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    decoder_start_token_id=1,
    **IDS,
)
MODERN = dict(BERT, local_attention=12, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=2)

# Family -> the model's class, and its config.
ENCODERS = {
    "albert": ("AlbertForMaskedLM", {**BERT, "embedding_size": 32}),
    "bert": ("BertForMaskedLM", BERT),
    "bert-classifier": ("BertForSequenceClassification", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "roberta-classifier": ("RobertaForSequenceClassification", BERT),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "layoutlm": ("LayoutLMForMaskedLM", BERT),
    "modernbert-classifier": ("ModernBertForSequenceClassification", MODERN),
}
# Encoders without a head.
BODIES = {
    "bert-body": ("BertModel", BERT),
    "distilbert-body": (
        "DistilBertModel",
        dict(vocab_size=84, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=130, **IDS),
    ),
    "modernbert-body": ("ModernBertModel", MODERN),
}
SEQ2SEQ = {
    "bart": ("BartForConditionalGeneration", BART),
    "t5": ("T5ForConditionalGeneration", T5),
}


def tiny_model(family: str, **changes) -> PreTrainedModel:
    """A random model of the family, in eval mode; changes go to its config."""
    name, config = {**ENCODERS, **BODIES, **SEQ2SEQ}[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**{**config, **changes})).eval()


def tokenizer(sentinels: bool = False) -> PreTrainedTokenizerFast:
    """Splits at spaces; marks a text as RoBERTa's does."""
    words = SPECIAL + (SENTINELS if sentinels else [f"x{i}" for i in range(len(SENTINELS))]) + WORDS
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
    )


def swapped(family: str, attention: dict = AUGMENTED, **changes) -> PreTrainedModel:
    """A converted tiny model, every parameter moved away from its start."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    linear, softmax = choose_layers(plan_layers(model, cross=attention.get("cross") == "linear"))
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
    copy_biases(model, linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attention" in name and "distance_bias" not in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model

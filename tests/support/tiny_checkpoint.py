"""Writes tiny checkpoints in Hugging Face format, and ways to spoil them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "a", "fox", "sat"]


def tiny_model(kind: str = "llama", **kwargs) -> PreTrainedModel:
    """Two random layers of the architecture `kind`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **ids, **kwargs}))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer that splits at spaces and knows WORDS."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def edit_json(file: Path, **changes) -> None:
    """Sets keys, and removes those that are None."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class Malicious:
    """Unpickling this would write the marker file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")

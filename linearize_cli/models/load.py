"""Loads any model that a user names.

torch and transformers are imported inside the functions: `linearize --help` does not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from linearize_cli.errors import UserError
from linearize_cli.inputs import user_path
from linearize_cli.models.load_errors import NAMES, brief, explained
from linearize_cli.models.weights import check_files, check_loaded, check_sizes, check_total

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Parameters below which threads wait for one another longer than they work; on a busy machine, many times longer.
SMALL = 20_000_000
FORMATS = (
    "A checkpoint holds config.json and model*.safetensors (Hugging Face), or params.json, tokenizer.model\n"
    "and consolidated.*.pth (Meta). A LoRA adapter must first be merged into its base model."
)
CONFIG_FILE = "Correct it, or take it again from where the model came from."
WEIGHT_FILES = "config.json and the weight files must be of one model that this transformers supports."
TOKENIZER_FILES = "Put the tokenizer's files (tokenizer.json or tokenizer.model) beside config.json."


def load_teacher(
    model: str,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    own_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `model` names, of a kind that can be converted, in eval mode, and its tokenizer.

    Args:
        model: a Hub id, a local folder (Hugging Face or Meta's Llama format), or `demo`; see `resolve_model`.
        dtype: of the weights, by torch's name (`bfloat16`); None keeps the checkpoint's.
        device: where the weights go, by torch's name (`cuda:0`).
        trust_remote_code: whether Python code in the checkpoint may run. If not, a model that needs it is
            refused; nothing asks. Pickled weights are read as tensors only, with or without it.
        own_code: whether an artifact runs the code that it carries, in place of this package's.

    Raises:
        UserError: the checkpoint is missing, not whole, not accessible or of another kind.
    """
    import torch

    from linearize_cli.models.meta_llama import is_meta_folder

    torch_dtype = checked_dtype(dtype)
    check_device(device)
    source = resolve_model(model)
    if is_meta_folder(source):
        loaded, tokenizer = _load_meta(model, source, torch_dtype, device)
    else:
        loaded, tokenizer = _load_hugging_face(
            model, source, torch_dtype, device, trust_remote_code, own_code
        )
    # Not the folder of the local cache: the name is kept where the model or an adapter of it is saved.
    loaded.name_or_path = loaded.config.name_or_path = tokenizer.name_or_path = model
    if device == "cpu" and loaded.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return loaded, tokenizer


def load_shape(model: str, dtype: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `model` names without its weights: on the meta device, made from its config alone. A folder
    in Meta's format must have its weights too: they tell the sizes. See `load_teacher`.
    """
    from linearize_cli.models.meta_llama import is_meta_folder, meta_llama_config

    source, wanted = resolve_model(model, weights=False), checked_dtype(dtype)
    with explained(model, "its config", CONFIG_FILE):
        if is_meta_folder(source):
            config, auto_class = meta_llama_config(source), "AutoModelForCausalLM"
        else:
            config, auto_class = _load_config(model, source, trust_remote_code)
        return _shape(config, auto_class, wanted, trust_remote_code)


def _shape(
    config: PreTrainedConfig, auto_class: str, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the model of a config on the meta device, in eval mode."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(
            config,
            dtype=dtype or config.dtype or torch.float32,
            attn_implementation=None,  # see _load_hugging_face
            trust_remote_code=trust_remote_code,
            experts_implementation="eager",  # the one that takes any dtype there
        )
    return model.eval()


def check_device(device: str) -> None:
    """
    Raises:
        UserError: nothing can run on it.
    """
    import torch

    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device `{device}` cannot be used.", brief(error)) from error


def checked_dtype(dtype: str | None) -> torch.dtype | None:
    """
    Raises:
        UserError: weights cannot have it.
    """
    import torch

    found = getattr(torch, dtype, None) if dtype else None
    if dtype and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserError(f"`{dtype}` is no dtype that weights can have.", "Use float32, bfloat16 or float16.")
    return found


def resolve_model(model: str, weights: bool = True) -> str:
    """The local folder of the checkpoint that `model` names; from the Hub, what it needs is downloaded first, its
    weights only if they are wanted.

    `demo` is the embedded teacher (`./demo` a folder of that name). A folder that exists wins over a Hub id.

    Raises:
        UserError: there is no such folder, it holds no checkpoint, or the Hub does not give it.
    """
    if not model.strip():
        raise UserError("MODEL is empty.", NAMES)
    if model == "demo":
        from linearize_cli.demo import teacher_path

        return str(teacher_path())
    path = user_path(model, NAMES)
    if path.is_dir():
        _require_checkpoint(path, path)
        return str(path)
    if path.exists():
        raise UserError(f"{path} is a file.", f"Name the folder it is in. {NAMES}")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"{path}: no such folder.", NAMES)
    from linearize_cli.artifact.hub import limited_waits

    with limited_waits(), explained(model, "the checkpoint", FORMATS):
        return _download(model, weights)


def _download(model: str, weights: bool) -> str:
    """The folder of a Hub repository's snapshot: its small files and one format of its weights, if wanted."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str, commit: str | None = None) -> Path:
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns, ignore_patterns="*/*"))

    folder = fetch("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken")
    _require_checkpoint(model, folder)
    if not weights:
        pass
    elif not (folder / "config.json").is_file():
        fetch("consolidated.*.pth", commit=folder.name)
    elif not any(
        fetch("model*.safetensors", "medusa.safetensors", commit=folder.name).glob("model*.safetensors")
    ):
        fetch("pytorch_model*.bin", commit=folder.name)
    return str(folder)


def _require_checkpoint(model: str | Path, folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise UserError(f"{model} has neither config.json nor params.json.", FORMATS)


def _load_meta(
    model: str, source: str, dtype: torch.dtype | None, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from linearize_cli.models.meta_llama import load_meta_llama, load_meta_tokenizer

    with explained(model, "the checkpoint", FORMATS):
        tokenizer = load_meta_tokenizer(source)
        loaded = load_meta_llama(source, dtype).to(device)
    for config in (loaded.config, loaded.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return loaded, tokenizer


def _load_hugging_face(
    model: str,
    source: str,
    dtype: torch.dtype | None,
    device: str,
    trust_remote_code: bool,
    own_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers import AutoTokenizer

    with explained(model, "its config.json", CONFIG_FILE):
        config, auto_class = _load_config(model, source, trust_remote_code)
        check_files(model, source)
        check_total(model, _shape(config, auto_class, dtype, trust_remote_code), source)
        if own_code:
            config = _own_config(config, source)
    with explained(model, "its tokenizer", TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    _check_tokenizer(model, tokenizer)
    with explained(model, "its weights", WEIGHT_FILES, source), _without_load_report():
        loaded, info = getattr(transformers, auto_class).from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            device_map=device,
            # sdpa where the class supports it, else eager, whatever config.json asks for.
            attn_implementation=None,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded refuses them
        )
    check_loaded(model, loaded, info)
    return loaded.eval(), tokenizer


def _load_config(model: str, source: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, str]:
    """The config, and the Auto class that loads the model."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(source)
    check_sizes(model, raw)
    kind, own_code = raw.get("model_type"), raw.get("auto_map") or {}
    if kind is None and not own_code:
        raise UserError(f"{model}: config.json has no model_type.", FORMATS)
    if kind not in CONFIG_MAPPING and not own_code:
        what = f"{model}: this transformers does not know the model_type `{kind}` in config.json."
        raise UserError(what, "Update it: pip install --upgrade transformers")
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    name = _auto_class(config, own_code)
    if name is None:
        what = f"{model}: by its config.json it is a `{kind}`, not a causal language model, encoder-decoder or encoder."
        raise UserError(what, "Choose a model that transformers' AutoModelForCausalLM loads, say.")
    return config, name


def _own_config(config: PreTrainedConfig, source: str) -> PreTrainedConfig:
    """Return the config of a class that the artifact's own code defines; with it, its own model class is loaded."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(config.auto_map["AutoConfig"], source).from_pretrained(source)


def _auto_class(config: PreTrainedConfig, own_code: dict) -> str | None:
    """The Auto class of the class that config.json names, else the first that knows the model type or its own
    code; an encoder (`is_decoder` is false) is no causal language model.
    """
    import transformers

    from linearize_cli.runtime.config import AUTO_CLASSES, PREFIX, auto_class

    known = [
        name
        for name in AUTO_CLASSES
        if name in own_code or type(config) in getattr(transformers, name)._model_mapping
    ]
    named = [auto_class(name.removeprefix(PREFIX)) for name in config.architectures or ()]
    if named and named[0] in known:
        return named[0]
    if getattr(config, "is_decoder", None) is False and "AutoModelForMaskedLM" in known:
        return "AutoModelForMaskedLM"
    return next(iter(known), None)


def _check_tokenizer(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without tokenizer files, transformers may make a tokenizer that knows special tokens alone."""
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise UserError(f"{model} has no tokenizer files.", TOKENIZER_FILES)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silences transformers' table of missing weights: check_loaded makes it an error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

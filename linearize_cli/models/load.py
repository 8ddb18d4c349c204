"""Loading of base models from the Hub, from local folders and from the package.

torch and transformers are imported inside the functions, so that `linearize --help` starts fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from linearize_cli.errors import UserError
from linearize_cli.models.device import AUTO, checked_dtype, chosen_device, in_working_dtype
from linearize_cli.models.find import FORMATS, resolve_model
from linearize_cli.models.load_errors import explained
from linearize_cli.models.sentence_folder import SentenceFolder
from linearize_cli.models.weights import check_files, check_loaded, check_sizes, check_total, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from linearize_cli.models.gguf import Header

# Below this number of parameters, threads spend more time on synchronization than on work.
SMALL = 20_000_000
CONFIG_FILE = "Correct it, or download it again."
WEIGHT_FILES = (
    "config.json and the weight files must belong to one model that this version of transformers supports."
)
TOKENIZER_FILES = "Put the tokenizer's files (tokenizer.json or tokenizer.model) beside config.json."


def load_teacher(
    model: str,
    dtype: str | None = None,
    device: str = AUTO,
    trust_remote_code: bool = False,
    own_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in eval mode, and its tokenizer.

    The arguments are those of `load_stored`. Without a dtype, the weights are in fp32 if the checkpoint is in
    half precision and the device is a CPU that is slow in it.

    Raises:
        UserError: the checkpoint is missing, incomplete, not accessible or of an unsupported kind.
    """
    loaded, tokenizer = load_stored(model, dtype, device, trust_remote_code, own_code)
    return (loaded if checked_dtype(dtype) else in_working_dtype(loaded, loaded.device)), tokenizer


def load_stored(
    model: str,
    dtype: str | None = None,
    device: str = AUTO,
    trust_remote_code: bool = False,
    own_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in eval mode, in the dtype that its checkpoint is stored in, and its tokenizer.

    Args:
        model: a Hub id, a local folder (Hugging Face or Meta's Llama format), a GGUF file (`FILE.gguf`, or
            `owner/name:FILE.gguf` on the Hub), or `demo` (the embedded teacher).
        dtype: the name of the weights' torch dtype (`bfloat16`). None and `auto` keep the checkpoint's.
        device: the name of the weights' torch device (`cuda:0`). `auto` is CUDA if there is one, then MPS,
            then the CPU.
        trust_remote_code: True if Python code in the checkpoint may run. Otherwise a model that needs it is
            refused, without a prompt. Pickled weights are always read as tensors only.
        own_code: True if an artifact runs the code that it carries instead of this package's code.

    Raises:
        UserError: the checkpoint is missing, incomplete, not accessible or of an unsupported kind.
    """
    import torch

    from linearize_cli.models.gguf import opened
    from linearize_cli.models.meta_llama import is_meta_folder

    torch_dtype, device = checked_dtype(dtype), chosen_device(device)
    with opened(resolve_model(model)) as (source, header):
        if is_meta_folder(source):
            loaded, tokenizer = _load_meta(model, source, torch_dtype, device)
        else:
            loaded, tokenizer = _load_hugging_face(
                model, source, header, torch_dtype, device, trust_remote_code, own_code
            )
    # The model and its adapters are saved with the user's name for it, not with the cache's folder.
    loaded.name_or_path = loaded.config.name_or_path = tokenizer.name_or_path = model
    if device == "cpu" and loaded.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return loaded, tokenizer


def load_shape(model: str, dtype: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model on the meta device, without weights, from its config alone.

    A folder in Meta's format needs its weights too, because they determine the sizes.

    Args:
        model: a Hub id, a local folder, a GGUF file or `demo`.
        dtype: the name of the weights' torch dtype. None uses the config's.
        trust_remote_code: True if Python code in the checkpoint may run.

    Raises:
        UserError: the checkpoint is missing, not accessible or of an unsupported kind.
    """
    from linearize_cli.models.gguf import OTHER, opened
    from linearize_cli.models.meta_llama import is_meta_folder, meta_llama_config

    found, wanted = resolve_model(model, weights=False), checked_dtype(dtype)
    with opened(found) as (source, header), explained(model, "its config", OTHER if header else CONFIG_FILE):
        if is_meta_folder(source):
            config, auto_class = meta_llama_config(source), "AutoModelForCausalLM"
        else:
            config, auto_class = _load_config(model, source, header, trust_remote_code)
        return _shape(config, auto_class, wanted, trust_remote_code)


def _shape(
    config: PreTrainedConfig, auto_class: str, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """Return the model of a config on the meta device (shapes without values), in eval mode."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(
            config,
            dtype=dtype or config.dtype or torch.float32,
            attn_implementation=None,  # see _load_hugging_face
            trust_remote_code=trust_remote_code,
            experts_implementation="eager",  # the only one that takes any dtype on the meta device
        )
    return model.eval()


def _load_meta(
    model: str, source: str, dtype: torch.dtype | None, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint in Meta's format, and its tokenizer.

    Args:
        model: the model's name in messages.
        source: the checkpoint's folder.
    """
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
    header: Header | None,
    dtype: torch.dtype | None,
    device: str,
    trust_remote_code: bool,
    own_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint in Hugging Face's format or a GGUF file, and check its files and its tokenizer.

    Args:
        model: the model's name in messages.
        source: the checkpoint's folder.
        header: the header of the GGUF file. None for another checkpoint.
        own_code: True if an artifact runs the code that it carries instead of this package's code.
    """
    import transformers
    from transformers import AutoTokenizer

    from linearize_cli.models.gguf import OTHER, check_all_used
    from linearize_cli.models.quantised import announce, make_ordinary, method_of

    file = {"gguf_file": header.file.name} if header else {}
    part, hint = ("its config", OTHER) if header else ("its config.json", CONFIG_FILE)
    with explained(model, part, hint):
        config, auto_class = _load_config(model, source, header, trust_remote_code)
        if not header:
            check_files(model, source)
        files = [header.file] if header else weight_files(source)
        check_total(model, _shape(config, auto_class, dtype, trust_remote_code), files)
        if own_code:
            config = _own_config(config, source)
    with explained(model, "its tokenizer", OTHER if header else TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **file)
    _check_tokenizer(model, tokenizer)
    kind = header.quantised if header else method_of(config)
    if kind:
        announce(header.file.name if header else model, kind, dtype or config.dtype)
    with explained(model, "its weights", OTHER if header else WEIGHT_FILES, source), _without_load_report():
        loaded, info = getattr(transformers, auto_class).from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            device_map=device,
            # None overrides config.json: sdpa if the class supports it, else eager.
            attn_implementation=None,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded refuses them
            quantization_config=transformers.GgufConfig(dequantize=True) if header else None,
            **({"checksums": False} if own_code else {}),  # the commands compare them
            **file,
        )
    check_loaded(model, loaded, info)
    if header:
        check_all_used(header, loaded)
    if kind:
        make_ordinary(loaded, dtype or config.dtype)
    if auto_class == "AutoModel":
        loaded.sentence_folder = SentenceFolder.read(source)
    return loaded.eval(), tokenizer


def _load_config(
    model: str, source: str, header: Header | None, trust_remote_code: bool
) -> tuple[PreTrainedConfig, str]:
    """Return the config of a checkpoint, and the name of the Auto class that loads its model.

    Args:
        header: the header of the GGUF file. None for another checkpoint.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    from linearize_cli.models.gguf import read_config
    from linearize_cli.models.quantised import request_dequantisation
    from linearize_cli.runtime.compatibility import fault

    file = header.file.name if header else None
    raw, _ = PreTrainedConfig.get_config_dict(source, gguf_file=file)
    check_sizes(model, raw, file or "config.json")
    kind, own_code = raw.get("model_type"), raw.get("auto_map") or {}
    if kind is None and not own_code:
        raise UserError(f"{model}: config.json has no model_type.", FORMATS)
    if kind not in CONFIG_MAPPING and not own_code:
        what = f"{model}: the installed transformers does not support model_type `{kind}` of config.json."
        raise UserError(what, "Update it: pip install --upgrade transformers")
    if header:
        config = read_config(header, raw)
    else:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        request_dequantisation(model, config)
    name = _auto_class(config, source, own_code)
    if name is None:
        what = f"{model}: `{kind}` in config.json is not a causal LM, encoder-decoder or encoder."
        raise UserError(what, "Choose a model that AutoModelForCausalLM loads, for example.")
    wrong = fault(config.model_type, causal="CausalLM" in name)
    if wrong:
        what = f"{model}: transformers {transformers.__version__} computes `{kind}` wrongly: {wrong}."
        raise UserError(what, "Update it: pip install --upgrade 'transformers>=5.23'")
    return config, name


def _own_config(config: PreTrainedConfig, source: str) -> PreTrainedConfig:
    """Return the config as an object of the config class in the artifact's own code, which loads its own
    model class.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(config.auto_map["AutoConfig"], source).from_pretrained(source)


def _auto_class(config: PreTrainedConfig, source: str, own_code: dict) -> str | None:
    """Return the name of the Auto class that loads a model, or None if the model is of no supported kind.

    It is the Auto class of the architecture in config.json, else the first one that supports the model type
    or the checkpoint's own code. A model with `is_decoder` false is an encoder. An encoder in a folder of
    sentence-transformers has no head, whatever architecture it was trained from.

    Args:
        source: the checkpoint's folder.
        own_code: the `auto_map` of config.json.
    """
    from linearize_cli.runtime.config import AUTO_CLASSES, PREFIX, auto_class

    known = [name for name, kinds in AUTO_CLASSES.items() if name in own_code or config.model_type in kinds]
    named = [auto_class(name.removeprefix(PREFIX)) for name in config.architectures or ()]
    if config.model_type in AUTO_CLASSES["AutoModel"] and SentenceFolder.read(source):
        return "AutoModel"
    if named and named[0] in known:
        return named[0]
    if getattr(config, "is_decoder", None) is False and "AutoModelForMaskedLM" in known:
        return "AutoModelForMaskedLM"
    return next(iter(known), None)


def _check_tokenizer(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer has ordinary tokens. Without tokenizer files, transformers makes one of special
    tokens only.
    """
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise UserError(f"{model} has no tokenizer files.", TOKENIZER_FILES)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Hide transformers' table of missing weights while the context is open. `check_loaded` turns them into
    an error.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

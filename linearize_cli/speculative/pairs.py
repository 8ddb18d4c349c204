"""Pairs of models with the same tokenizer for speculative decoding: a target, and a drafter that proposes
tokens for it.

The target is an artifact and the drafter any model, or the target is a softmax teacher and the drafter an
artifact made from it. In the second case both share the base weights if the artifact keeps its LoRA adapter
separately.
"""

import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.checksums import check_unchanged
from linearize_cli.artifact.load import artifact_name, enter_own_feature_map, load, refuse_linearized
from linearize_cli.artifact.record import read_config, read_record
from linearize_cli.errors import UserError, first_five
from linearize_cli.models.find import resolve_model
from linearize_cli.models.load import load_teacher
from linearize_cli.models.load_errors import explained
from linearize_cli.models.tasks import CausalLM, task_of
from linearize_cli.runtime import linearize

ADAPTER = "adapter"
LINEAR = ".linear_attention."


@dataclass(frozen=True)
class Pair:
    """A target and a drafter with the same vocabulary.

    Attributes:
        target: the model whose text is generated.
        drafter: the model that proposes tokens.
        tokenizer: the tokenizer of both.
        shared: True if both use the same tensors in memory for the base weights.
    """

    target: PreTrainedModel
    drafter: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shared: bool = False


def drafted_by(
    artifact: str | Path,
    drafter: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
) -> Pair:
    """Load an artifact as the target, and a model that drafts for it. The drafter may be a softmax or a
    linearized model.

    Args:
        artifact: the artifact's folder or Hub id.
        drafter: the drafter's folder or Hub id.
        device: the torch device of both. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: torch's name of the dtype. None uses each model's own.
        trust_remote_code: allow both models to run their own code.
        checksums: False to load files that differ from the artifact's checksums.

    Raises:
        UserError: one of them cannot be loaded, is not a causal language model or cannot be rolled back, or
            their vocabularies differ.
    """
    options = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    target, tokenizer = load(artifact, **options, own_code=trust_remote_code, checksums=checksums)
    enter_own_feature_map(drafter, trust_remote_code)
    model, other = load_teacher(drafter, **options)
    check_pair(str(artifact), target, tokenizer, drafter, model, other)
    return Pair(target, model, tokenizer)


def drafting_for_teacher(
    artifact: str | Path,
    teacher: str | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
) -> Pair:
    """Load the softmax model that an artifact was made from, and the artifact as its drafter.

    If the artifact has a folder `adapter` with its LoRA weights, both models share all other weights except
    those that the conversion added. If not, each has its own.

    Args:
        artifact: the artifact's folder or Hub id.
        teacher: the softmax model's folder or Hub id. None uses `base_model` of linearize.json.
        device: the torch device of both. `auto` is CUDA if there is one, then MPS, then the CPU.
        dtype: torch's name of the dtype. None uses the artifact's.
        trust_remote_code: allow both models to run their own code.
        checksums: False to load files that differ from the artifact's checksums.

    Raises:
        UserError: one of them cannot be loaded, is not a causal language model or cannot be rolled back, or
            their vocabularies differ.
    """
    folder = Path(resolve_model(artifact_name(artifact)))
    if checksums:
        check_unchanged(folder, artifact_name(artifact))
    enter_own_feature_map(artifact_name(artifact), trust_remote_code)
    config = read_config(folder)
    record = config.get("linearize")
    if record is None:
        what = f"{artifact} is a {config.get('model_type')} model, not a linearized one"
        raise UserError(what, f"Convert it first: linearize convert {artifact}")
    hint = "The softmax model that it was made from must be at the path of `base_model` in linearize.json."
    name = teacher or read_record(folder).get("base_model")
    if name is None:
        raise UserError(f"{artifact} has no linearize.json with the path of its teacher", hint)
    dtype = dtype or config.get("dtype")
    options = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    try:
        refuse_linearized(name)
        target, tokenizer = load_teacher(name, **options)
    except UserError as error:
        raise UserError(f"no teacher for {artifact}: {error.what}", f"{error.hint}\n{hint}") from error
    if type(target).__name__ != record["base_class"]:
        what = f"{name} is a {type(target).__name__}, but {artifact} was made from a {record['base_class']}"
        raise UserError(what, hint)
    shared = (folder / ADAPTER).is_dir()
    if shared:
        drafter, other = sharing_weights(target, folder, record), tokenizer
    else:
        drafter, other = load(artifact, **options, checksums=False)
    check_pair(name, target, tokenizer, str(artifact), drafter, other)
    return Pair(target, drafter, tokenizer, shared)


def sharing_weights(teacher: PreTrainedModel, folder: Path, record: dict) -> PreTrainedModel:
    """Load the linearized model of an artifact that has a LoRA adapter, with the teacher's tensors as base
    weights.

    Args:
        teacher: the softmax model. It does not change.
        folder: the artifact's folder.
        record: the entry `linearize` of its config.json.

    Raises:
        UserError: the artifact's weights are incomplete, or belong to another teacher.
    """
    own = {id(tensor): tensor for tensor in chain(teacher.parameters(), teacher.buffers())}
    student = linearize(copy.deepcopy(teacher, own), record)
    hint = "Convert it again, or name the model that it was made from."
    with explained(str(folder), "its linear parts", hint, str(folder)):
        linear = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                names = filter(lambda name: LINEAR in name, weights.keys())
                linear |= {name: weights.get_tensor(name) for name in names}
        missing = {name for name in student.state_dict() if LINEAR in name} - linear.keys()
        if missing:
            raise UserError(f"{folder} lacks the weights {first_five(missing)}", hint)
        student.load_state_dict(linear, strict=False)
    with explained(str(folder / ADAPTER), "the adapter", hint, str(folder / ADAPTER)):
        vars(student).pop("hf_device_map", None)  # peft would move parameters by this map
        wrapped = PeftModel(student, PeftConfig.from_pretrained(folder / ADAPTER))
        loaded = wrapped.load_adapter(str(folder / ADAPTER), "default", torch_device=str(teacher.device))
        if loaded.missing_keys or loaded.unexpected_keys:
            names = first_five([*loaded.missing_keys, *loaded.unexpected_keys])
            raise UserError(f"{folder / ADAPTER} and the model do not fit: {names}", hint)
    return wrapped.get_base_model().eval()


def check_pair(
    target_name: str,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter_name: str,
    drafter: PreTrainedModel,
    other: PreTrainedTokenizerBase,
) -> None:
    """Check that two models can work as target and drafter.

    Args:
        target_name: the target's name in errors.
        tokenizer: the target's tokenizer.
        drafter_name: the drafter's name in errors.
        other: the drafter's tokenizer.

    Raises:
        UserError: a model is not a causal language model or cannot be rolled back, or the vocabularies
            differ.
    """
    for name, model, own in ((target_name, target, tokenizer), (drafter_name, drafter, other)):
        if not isinstance(task_of(model, own), CausalLM):
            what = f"{name} ({type(model).__name__}) is no causal language model"
            raise UserError(what, "Target and drafter must both be causal language models.")
        if model._is_stateful:
            what = f"{name} ({type(model).__name__}) has a recurrent state, which cannot be rolled back"
            raise UserError(what, "Decode it without speculation.")
    sizes = [model.config.get_text_config().vocab_size for model in (target, drafter)]
    if tokenizer.get_vocab() != other.get_vocab() or sizes[0] != sizes[1]:
        what = f"{drafter_name} has another vocabulary ({sizes[1]:,}) than {target_name} ({sizes[0]:,})"
        raise UserError(what, "Use a drafter with the same tokenizer, such as a smaller model of its family.")

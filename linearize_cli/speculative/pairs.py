"""Two models of one tokenizer, one of which drafts for the other: a model for an artifact, or an artifact for the
softmax model it was made from, on one set of base weights where its adapter was kept.
"""

import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import artifact_name, enter_own_feature_map, load, refuse_linearized
from linearize_cli.artifact.record import read_config, read_record
from linearize_cli.errors import UserError, first_five
from linearize_cli.models.load import load_teacher, resolve_model
from linearize_cli.models.load_errors import explained
from linearize_cli.models.tasks import CausalLM, task_of
from linearize_cli.runtime import linearize

ADAPTER = "adapter"
LINEAR = ".linear_attention."


@dataclass(frozen=True)
class Pair:
    """The drafter's tokens are the target's.

    Attributes:
        shared: whether the models hold their base weights together.
    """

    target: PreTrainedModel
    drafter: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shared: bool = False


def drafted_by(
    artifact: str | Path,
    drafter: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """An artifact, and a model that drafts for it, softmax or linearized.

    Raises:
        UserError: one of them cannot be had, or they do not fit each other.
    """
    options = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    target, tokenizer = load(artifact, **options, own_code=trust_remote_code)
    enter_own_feature_map(drafter, trust_remote_code)
    model, other = load_teacher(drafter, **options)
    check_pair(str(artifact), target, tokenizer, drafter, model, other)
    return Pair(target, model, tokenizer)


def drafting_for_teacher(
    artifact: str | Path,
    teacher: str | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """The softmax model that an artifact was made from, and the artifact, which drafts for it. Where it has its
    adapter, all but LoRA and the linear parts is held once: then the drafter's tensors are the target's own.

    Args:
        teacher: where that model is; None: where linearize.json says that it was.
        dtype: None: the artifact's.

    Raises:
        UserError: one of them cannot be had, or they do not fit each other.
    """
    enter_own_feature_map(artifact_name(artifact), trust_remote_code)
    folder = Path(resolve_model(artifact_name(artifact)))
    config = read_config(folder)
    record = config.get("linearize")
    if record is None:
        what = f"{artifact} is a {config.get('model_type')} model, not a linearized one"
        raise UserError(what, f"Convert it first: linearize convert {artifact}")
    hint = "The softmax model it was made from must be where `base_model` of linearize.json says."
    name = teacher or read_record(folder).get("base_model")
    if name is None:
        raise UserError(f"{artifact} has no linearize.json that names its teacher", hint)
    dtype = dtype or config.get("dtype")
    options = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    try:
        refuse_linearized(name)
        target, tokenizer = load_teacher(name, **options)
    except UserError as error:
        raise UserError(f"no teacher for {artifact}: {error.what}", f"{error.hint}\n{hint}") from error
    if type(target).__name__ != record["base_class"]:
        raise UserError(
            f"{name} is a {type(target).__name__}, and {artifact} was a {record['base_class']}", hint
        )
    shared = (folder / ADAPTER).is_dir()
    drafter, other = (beside(target, folder, record), tokenizer) if shared else load(artifact, **options)
    check_pair(name, target, tokenizer, str(artifact), drafter, other)
    return Pair(target, drafter, tokenizer, shared)


def beside(teacher: PreTrainedModel, folder: Path, record: dict) -> PreTrainedModel:
    """The linearized model of an artifact with an adapter, on the teacher's own parameters and buffers.

    Raises:
        UserError: the artifact's weights are not whole, or another teacher's.
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
        vars(student).pop("hf_device_map", None)  # by which peft would move parameters
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
    """
    Raises:
        UserError: one of the models is no decoder, or cannot take tokens back, or their tokens differ.
    """
    for name, model, own in ((target_name, target, tokenizer), (drafter_name, drafter, other)):
        if not isinstance(task_of(model, own), CausalLM):
            what = f"{name} ({type(model).__name__}) is no causal language model"
            raise UserError(what, "Only those draft, or are drafted for.")
        if model._is_stateful:
            what = f"{name} ({type(model).__name__}) has a recurrent state, which cannot take rejected tokens back"
            raise UserError(what, "Decode it without speculation.")
    sizes = [model.config.get_text_config().vocab_size for model in (target, drafter)]
    if tokenizer.get_vocab() != other.get_vocab() or sizes[0] != sizes[1]:
        what = f"{drafter_name} has another vocabulary ({sizes[1]:,}) than {target_name} ({sizes[0]:,})"
        raise UserError(
            what, "Name a drafter with the same tokenizer: a smaller model of the same family, say."
        )

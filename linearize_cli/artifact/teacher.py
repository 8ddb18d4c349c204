"""The softmax model that an artifact was made from."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.errors import UserError
from linearize_cli.models.load import load_teacher
from linearize_cli.models.tasks import task_of


def teacher_name(folder: Path, record: dict[str, Any], asked: str | None) -> str:
    """The model that was asked for, or the one that the artifact's record names.

    Raises:
        UserError: there is neither.
    """
    name = asked or record.get("base_model")
    if name is None:
        raise UserError(
            f"{folder} has no linearize.json that names its teacher", "Pass --teacher with its base model."
        )
    return name


def original_model(
    folder: Path,
    base: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str | None,
    device: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The teacher.

    Raises:
        UserError: it cannot be had, or is another kind of model than the student, or has another vocabulary.
    """
    try:
        refuse_linearized(base)
        teacher, own = load_teacher(base, dtype, device, trust_remote_code)
    except UserError as error:
        hint = "Pass --teacher with the softmax model that the artifact was made from: a folder or a Hub id."
        raise UserError(f"no teacher for {folder}: {error.what}", f"{error.hint}\n{hint}") from error
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    classes = [type(task_of(model, tokenizer)) for model in (teacher, student)]
    hint = "Pass --teacher with the model that the artifact was made from."
    if classes[0] is not classes[1]:
        raise UserError(f"{base} ({type(teacher).__name__}) is another kind of model than {folder}", hint)
    if own.get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        raise UserError(f"{base} has another vocabulary ({sizes[0]:,}) than {folder} ({sizes[1]:,})", hint)
    if teacher.config.num_labels != student.config.num_labels:
        raise UserError(f"{base} has other classes than {folder}", hint)
    return teacher

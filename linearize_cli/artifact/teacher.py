"""Loading of the softmax model that an artifact was made from."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.artifact.load import refuse_linearized
from linearize_cli.errors import UserError
from linearize_cli.models.load import load_teacher
from linearize_cli.models.tasks import task_of


def teacher_name(folder: Path, record: dict[str, Any], asked: str | None) -> str:
    """Return the requested teacher, or the base model that `linearize.json` names if none was requested.

    Raises:
        UserError: no teacher was requested, and `linearize.json` names no base model.
    """
    name = asked or record.get("base_model")
    if name is None:
        raise UserError(
            f"{folder} has no linearize.json that names its base model", "Pass --teacher with its base model."
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
    """Load the teacher of an artifact, and check that it suits the artifact's model.

    Args:
        folder: the artifact, for messages.
        base: the teacher's folder or Hub id.
        student, tokenizer: the artifact's own.
        dtype: the name of the torch dtype. None keeps the teacher's.

    Raises:
        UserError: it cannot be loaded, or its task, vocabulary or classes differ from the student's.
    """
    try:
        refuse_linearized(base)
        teacher, own = load_teacher(base, dtype, device, trust_remote_code)
    except UserError as error:
        hint = "Pass --teacher with the folder or the Hub id of the artifact's base model."
        raise UserError(
            f"cannot load the teacher of {folder}: {error.what}", f"{error.hint}\n{hint}"
        ) from error
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    classes = [type(task_of(model, tokenizer)) for model in (teacher, student)]
    hint = "Pass --teacher with the model that the artifact was made from."
    if classes[0] is not classes[1]:
        raise UserError(f"{base} ({type(teacher).__name__}) has another task than {folder}", hint)
    if own.get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        raise UserError(f"{base} has another vocabulary ({sizes[0]:,}) than {folder} ({sizes[1]:,})", hint)
    if teacher.config.num_labels != student.config.num_labels:
        raise UserError(f"{base} has other classes than {folder}", hint)
    return teacher

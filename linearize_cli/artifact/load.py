"""Loading of artifacts, and checks that a folder is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize_cli.artifact.record import CONFIG, read_config
from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    own_code: bool = False,
    checksums: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a linearized model in eval mode, and its tokenizer.

    Args:
        path: a folder or a Hub id.
        device: the name of the weights' torch device (`cuda:0`).
        dtype: the name of the weights' torch dtype. None keeps the artifact's.
        trust_remote_code: True if a user's own feature map, whose code is in the artifact, may run.
        own_code: True to run the artifact's code instead of this package's. It requires `trust_remote_code`.
        checksums: False to load files that differ from the checksums in linearize.json.

    Raises:
        UserError: the artifact does not exist, is not a linearized model, or is damaged.
    """
    import linearize_cli.runtime  # noqa: F401  lets transformers load artifacts
    from linearize_cli.artifact.checksums import check_unchanged
    from linearize_cli.models.find import resolve_model
    from linearize_cli.models.load import load_teacher
    from linearize_cli.runtime.dispatch import converted

    path = artifact_name(path)
    if checksums:
        check_unchanged(Path(resolve_model(path)), path)
    enter_own_feature_map(path, trust_remote_code)
    own_code = own_code and trust_remote_code
    model, tokenizer = load_teacher(path, dtype, device, own_code, own_code)
    if not converted(model):
        raise UserError(
            f"{path} is a softmax model ({type(model).__name__}), not a linearized one",
            f"Convert it first: linearize convert {path}",
        )
    return model, tokenizer


def artifact_name(path: str | Path) -> str:
    """Return the absolute path of a folder, or a Hub id unchanged.

    The absolute path distinguishes a folder named `demo` from the embedded teacher.
    """
    folder = user_path(path)
    return str(folder.resolve() if folder.is_dir() else path)


def check_artifact(folder: Path) -> None:
    """Check that a folder is an artifact.

    Raises:
        UserError: the folder is no artifact. The message says what it is instead.
    """
    if not folder.is_dir():
        hint = "Pass the folder that `linearize convert` wrote."
        if not folder.exists() and len(folder.parts) == 2:
            hint += f"\nAn artifact on the Hub: hf download {folder} --local-dir {folder.name}"
        raise UserError(f"{folder} is not a folder", hint)
    if not (folder / CONFIG).exists():
        hint = "Pass the folder that `linearize convert` wrote."
        raise UserError(f"{folder} is not a linearized artifact: it has no config.json", hint)
    config = read_config(folder)
    if "linearize" not in config:
        what = (
            f"{folder} is not a linearized artifact: config.json describes a {config.get('model_type')} model"
        )
        raise UserError(what, f"Convert it first: linearize convert {folder}")
    modules = {name.partition(".")[0] for name in (config.get("auto_map") or {}).values() if name}
    missing = first_five(f"{name}.py" for name in modules if not (folder / f"{name}.py").exists())
    if missing:
        raise UserError(f"{folder} lacks its code files: {missing}", "Convert again.")


def refuse_linearized(model: str) -> None:
    """Check that a model is not linearized already.

    Raises:
        UserError: the model is linearized.
    """
    from linearize_cli.models.find import resolve_model

    if "linearize" in read_config(Path(resolve_model(model, weights=False))):
        raise UserError(
            f"{model} is already a linearized model", "Pass the softmax model that it was made from."
        )


def enter_own_feature_map(path: str, trust_remote_code: bool) -> None:
    """Register the user's own feature map of an artifact, which runs code from the artifact. Do nothing if it
    uses none.

    Args:
        path: the artifact's folder or Hub id.

    Raises:
        UserError: the code is missing or may not run.
    """
    from linearize_kernels.parts.far import FAR_PARTS
    from linearize_kernels.parts.feature_maps import FEATURE_MAPS

    from linearize_cli.models.find import resolve_model
    from linearize_cli.runtime.bundle import OWN, load_own_code

    folder = resolve_model(path)
    far = read_config(Path(folder)).get("linearize", {}).get("attention", {}).get("far") or {}
    name = far.get("feature_map")
    if name is None or name in FEATURE_MAPS or name in FAR_PARTS:
        return
    files = sorted(Path(folder).glob(f"{OWN}*.py"))
    if not trust_remote_code or not files:
        where = f"in {first_five([file.name for file in files])}, which was not run" if files else "missing"
        raise UserError(
            f"{path}: the code of its feature map `{name}` is {where}",
            "Read that code. If you trust it, add --trust-remote-code." if files else "Convert it again.",
        )
    for file in files:
        load_own_code(file)

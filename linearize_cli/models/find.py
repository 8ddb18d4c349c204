"""Checkpoints by the names that users give: local folders and files, the Hub, and the package."""

from __future__ import annotations

from pathlib import Path

from linearize_cli.errors import UserError
from linearize_cli.inputs import user_path
from linearize_cli.models.load_errors import NAMES, explained
from linearize_cli.models.sentence_folder import is_module_folder, read_modules

FORMATS = (
    "A checkpoint holds config.json and model*.safetensors (Hugging Face), or params.json, tokenizer.model\n"
    "and consolidated.*.pth (Meta), or is a GGUF file. A LoRA adapter must first be merged into its base model."
)


def resolve_model(model: str, weights: bool = True) -> str:
    """Return the local folder of a checkpoint, or its GGUF file. One on the Hub is downloaded first.

    An existing folder takes precedence over a Hub id. `demo` is the embedded teacher, and `./demo` a folder.

    Args:
        model: a Hub id, a local folder, a GGUF file or `demo`.
        weights: False to download everything except the weights. A GGUF file is always downloaded whole.

    Raises:
        UserError: the folder does not exist, holds no checkpoint, or the download fails.
    """
    from linearize_cli.models import gguf

    if not model.strip():
        raise UserError("MODEL is empty.", NAMES)
    if model == "demo":
        from linearize_cli.demo import teacher_path

        return str(teacher_path())
    path = user_path(model, NAMES)
    if path.is_dir():
        files = [file.name for file in path.glob(f"*{gguf.SUFFIX}") if file.is_file()]
        if files and not _has_config(path):
            return str(path / gguf.one_of(path, files, "/"))
        _require_checkpoint(path, path)
        return str(path)
    if path.is_file() and path.suffix == gguf.SUFFIX:
        return str(path)
    if path.exists():
        raise UserError(f"{path} is a file.", f"Pass the folder that contains it. {NAMES}")
    repo, file = gguf.split_name(model)
    if file and (folder := user_path(repo, NAMES)).is_dir():
        return resolve_model(str(folder / file), weights)
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1 or repo.endswith(gguf.SUFFIX):
        raise UserError(f"{path}: no such {'file' if repo.endswith(gguf.SUFFIX) else 'folder'}.", NAMES)
    from linearize_cli.hub import limited_waits

    with limited_waits(), explained(repo, "the checkpoint", FORMATS):
        return gguf.download(repo, file) if file else _download(repo, weights)


def _download(model: str, weights: bool) -> str:
    """Download the small files of a Hub repository, and one format of its weights if requested.

    Return the folder, or the repository's GGUF file if it has no other checkpoint.
    """
    from huggingface_hub import snapshot_download

    from linearize_cli.models import gguf

    def fetch(*patterns: str, commit: str | None = None) -> Path:
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns, ignore_patterns="*/*"))

    folder = fetch("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "README.md")
    if not _has_config(folder) and (file := gguf.download(model, commit=folder.name)):
        return file
    _require_checkpoint(model, folder)
    for name in filter(is_module_folder, (module["path"] for module in read_modules(folder))):
        snapshot_download(model, revision=folder.name, allow_patterns=f"{name}/*")
    if not weights:
        pass
    elif not (folder / "config.json").is_file():
        fetch("consolidated.*.pth", commit=folder.name)
    elif not any(
        fetch("model*.safetensors", "medusa.safetensors", commit=folder.name).glob("model*.safetensors")
    ):
        fetch("pytorch_model*.bin", commit=folder.name)
    return str(folder)


def _has_config(folder: Path) -> bool:
    """Return True if a folder holds config.json or params.json."""
    return any((folder / name).is_file() for name in ("config.json", "params.json"))


def _require_checkpoint(model: str | Path, folder: Path) -> None:
    """Check that a folder holds config.json or params.json."""
    if not _has_config(folder):
        raise UserError(f"{model} has neither config.json nor params.json.", FORMATS)

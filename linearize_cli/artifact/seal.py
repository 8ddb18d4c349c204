"""`seal`: renew the checksums and the fingerprint of an artifact after a deliberate change."""

from pathlib import Path
from typing import Any

from linearize_cli.artifact.checksums import changed
from linearize_cli.artifact.fingerprint import fingerprint, in_float32
from linearize_cli.artifact.load import check_artifact, load
from linearize_cli.artifact.record import read_record, write_record
from linearize_cli.checksums import checksums
from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import user_path
from linearize_cli.models.tasks import task_of


def seal(
    artifact: str | Path = ".",
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the checksums of an artifact's files and its fingerprint into `linearize.json`.

    Args:
        artifact: the folder.
        device: the torch device to run on. `auto` is CUDA if there is one, then MPS, then the CPU.
        trust_remote_code: True to compute the fingerprint with the artifact's own code.

    Returns:
        `artifact`, `files` (their number), and `changed` (the files that were changed, missing or new, as
            text).

    Raises:
        UserError: the folder is not a complete artifact.
    """
    folder = user_path(artifact)
    check_artifact(folder)
    report = read_record(folder)
    if not report:
        raise UserError(f"{folder} has no linearize.json to seal", "`linearize convert` writes it.")
    options = dict(device=device, trust_remote_code=trust_remote_code, own_code=trust_remote_code)
    model, tokenizer = load(folder.resolve(), **options, checksums=False)
    sealed = checksums(folder)
    gone = [name for name in report.get("checksums") or () if name.endswith(".py") and name not in sealed]
    if gone:
        raise UserError(f"{folder} lacks its code files: {first_five(gone)}", "Download or convert it again.")
    facts = {
        "artifact": str(artifact),
        "files": len(sealed),
        "changed": changed(report, folder),
    }
    exact = in_float32(model) or model
    report["checksums"] = sealed
    report["fingerprint"] = fingerprint(task_of(model, tokenizer), exact, tokenizer)
    write_record(folder, report)
    return facts

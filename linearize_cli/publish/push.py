"""`push`: upload an artifact to the Hugging Face Hub."""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from linearize_cli.artifact.completeness import artifact_files
from linearize_cli.artifact.record import read_record
from linearize_cli.errors import UserError
from linearize_cli.hub import cause_of, hub_error, limited_waits, persistent, redacted_chain
from linearize_cli.inputs import user_path
from linearize_cli.models.origin import obstacle
from linearize_cli.publish.upload import MALFORMED, create_repository, upload

# Weights of an earlier push under other names would be loaded in the place of the new ones.
STALE = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("medusa.safetensors", "adapter/*"),
)


def push(
    artifact: Path | str = ".",
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    verify: bool = True,
    yes: bool = False,
    trust_remote_code: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> dict:
    """Upload an artifact's files to a model repository in one commit. The repository is created if it does
    not exist.

    Args:
        artifact: the folder that `linearize convert` wrote.
        repo_id: `NAMESPACE/NAME`, or `NAME` under the signed-in user. None uses the folder's name.
        private: the visibility of a new repository. None uses the Hub's default. An existing repository must
            have this visibility.
        revision: an existing branch to commit to. None uses `main`.
        create_pr: open a pull request on `main` instead of committing to it.
        commit_message: title of the commit, and of the pull request. None uses "Upload linearized model".
        token: a Hub access token. None uses that of `hf auth login` or HF_TOKEN.
        dry_run: return what would be pushed, and write nothing on the Hub.
        verify: before anything is sent, load the artifact in a new process without this package, and run
            `verify --quick` on it.
        yes: publish a copy of a base model that is gated, or whose licence forbids changed copies. Without it,
            such an artifact is refused.
        trust_remote_code: allow these checks to run code in the artifact that is not this package's.
        note: called with a line of text before each check.

    Returns:
        `repo_id`, `url`, `revision`, `commit` (hash), `pull_request` (URL or None), `files` ([{`path`, `size`
        in bytes}], changed or not), `bytes` (their sum), `dry_run`.

    Raises:
        UserError: the folder is not a complete artifact, or the Hub refuses or cannot be reached.
        CheckFailed: the artifact does not pass the checks. Nothing was sent.
    """
    folder = user_path(artifact)
    files = [{"path": name, "size": (folder / name).stat().st_size} for name in artifact_files(folder)]
    revision = revision or "main"
    if create_pr and revision != "main":
        raise UserError(
            f"--create-pr and --revision {revision} exclude each other",
            "A pull request is always opened against main: leave one of the two out.",
        )
    token = (token or get_token() or "").strip()
    name = repo_id or folder.resolve().name
    if not dry_run or "/" not in name:
        _require_sign_in(token)
    _check_name(name)
    record = read_record(folder)
    if not yes and (why := obstacle(record.get("origin") or {})):
        raise UserError(
            f"the base model {record.get('base_model')} {why}",
            "Read its licence. If you may publish this model, add --yes.",
        )
    if verify:
        from linearize_cli.publish.gate import check_publishable  # imports torch

        check_publishable(folder, [file["path"] for file in files], trust_remote_code, note)
    if named := naming_folders(folder, [file["path"] for file in files]):
        note(f"these files name folders of this machine, which the Hub will show: {', '.join(named)}")
    api = HfApi(token=token or False)
    commit = pull_request = None
    try:
        with limited_waits():
            repo_id = _full_repo_id(api, repo_id or folder.resolve().name)
            if not dry_run:
                _prepare_repo(api, repo_id, private, revision, create_pr)
                info, pull_request = upload(
                    api,
                    repo_id,
                    revision,
                    create_pr,
                    folder_path=folder,
                    commit_message=commit_message or "Upload linearized model",
                    allow_patterns=[glob.escape(file["path"]) for file in files],
                    delete_patterns=list(STALE),
                )
                commit = info.oid
                if create_pr and pull_request is None:
                    note("the repository has these files already: no pull request was opened")
    except (HTTPError, OSError, RuntimeError, *MALFORMED) as error:
        raise _explained(
            error, api.endpoint, repo_id or "the repository", revision, token, create_pr
        ) from error
    return {
        "repo_id": repo_id,
        "url": f"{api.endpoint}/{repo_id}" + ("" if revision == "main" else f"/tree/{revision}"),
        "revision": revision,
        "commit": commit,
        "pull_request": pull_request,
        "files": files,
        "bytes": sum(file["size"] for file in files),
        "dry_run": dry_run,
    }


def naming_folders(folder: Path, files: list[str]) -> list[str]:
    """Return the JSON and YAML files that name files or folders of this machine by their absolute paths."""
    found = []
    for name in files:
        if name.endswith((".json", ".yaml")) and not name.startswith("tokenizer"):
            paths = re.findall(
                r'(?:"|: |- )(/[^"\n]+)', (folder / name).read_text(encoding="utf-8", errors="replace")
            )
            if any(os.path.exists(path) for path in paths):
                found.append(name)
    return found


def _check_name(repo_id: str) -> None:
    """Check that the Hub allows the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} cannot name a repository",
            f"{error}\nGive one as REPO_ID: linearize push ARTIFACT NAMESPACE/NAME.",
        ) from error


def _full_repo_id(api: HfApi, repo_id: str) -> str:
    """Return `NAMESPACE/NAME`. The signed-in user is the namespace of a name without one."""
    if "/" in repo_id:
        return repo_id
    _require_sign_in(api.token)
    return f"{persistent(api.whoami)['name']}/{repo_id}"


def _require_sign_in(token: str | bool) -> None:
    if not token or not re.fullmatch("[!-~]+", token):
        raise UserError(
            "the token holds characters that no token has" if token else "not signed in to the Hub",
            "Run `hf auth login`, or give a token with write access by --token or HF_TOKEN\n"
            "(make one at https://huggingface.co/settings/tokens).",
        )


def _prepare_repo(api: HfApi, repo_id: str, private: bool | None, revision: str, create_pr: bool) -> None:
    """Create the repository unless it exists, and check its visibility.

    A missing revision is not created: `upload_folder` refuses it.

    Args:
        private: the visibility. None: the Hub's default for a new repository, and no check of an existing
            one.

    Raises:
        UserError: the existing repository has another visibility.
    """
    if revision == "main" and not (create_pr and persistent(lambda: api.repo_exists(repo_id))):
        create_repository(api, repo_id, private)
    # create_repo does not change the visibility of an existing repository. Never publish what should be private.
    if private is not None and persistent(lambda: api.repo_info(repo_id)).private != private:
        raise UserError(
            f"{repo_id} exists already and is {'public' if private else 'private'}",
            f"Change that in {api.endpoint}/{repo_id}/settings, or push to another name,\n"
            "or leave out --private/--no-private.",
        )


def _explained(
    error: Exception, endpoint: str, repo: str, revision: str, token: str, create_pr: bool
) -> UserError:
    """Translate a failure of the upload into a UserError that says what to do, with access tokens removed."""
    again = "Run the same command again: a push is one commit, and what has arrived is not sent twice."
    if create_pr:
        url = f"{endpoint}/{repo}/discussions"
        again = f"See {url} first: the pull request may be open. Else run the same command again."
    instead = (
        "Use a token with write access (https://huggingface.co/settings/tokens), push to a namespace of yours,\n"
        "or propose the files with --create-pr. Without --revision, push creates the repository."
    )
    said = cause_of(redacted_chain(error, token), token)
    if isinstance(error, RuntimeError):
        return UserError(f"the upload to {repo} broke off ({said})", again)
    if known := hub_error(error, repo, "write to", instead, again, revision, token):
        return known
    if isinstance(error, MALFORMED):
        kind = type(error).__name__
        return UserError(
            f"the Hub at {endpoint} answered in a form that is not the Hub's ({kind}: {said})",
            f"Check HF_ENDPOINT, and whether a proxy or a login page answers in its place.\n{again}",
        )
    return UserError(f"the push to {repo} failed ({said})", "--debug shows where.")

"""Push an artifact to the Hugging Face Hub: check the folder, choose its files, upload, explain failures."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP client's own base class: httpx or httpx2, by the version of huggingface_hub
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from linearize_cli.artifact.checksums import changed
from linearize_cli.artifact.hub import (
    MALFORMED,
    create_repository,
    limited_waits,
    persistent,
    timed_out,
    upload,
)
from linearize_cli.artifact.record import report_faults
from linearize_cli.errors import UserError
from linearize_cli.inputs import read_object, user_path

REQUIRED = ("config.json", "linearize.json", "recipe.yaml", "README.md", "tokenizer_config.json")
VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
BELONGS = (
    *("model*.safetensors", "medusa.safetensors", "adapter/**/*"),
    *("*.json", "*.yaml", "*.py", "*.png", "README.md", "LICENSE*", "NOTICE*"),
    *("*.model", "vocab.txt", "merges.txt", "*.jinja", "additional_chat_templates/*.jinja"),
)
# Weights of an earlier push under other names would be loaded in place of the new ones, so they go.
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
) -> dict:
    """Upload an artifact's files to a model repository in one commit, and create the repository if need be.

    Args:
        artifact: the folder that `linearize convert` wrote.
        repo_id: `NAMESPACE/NAME`, or `NAME` under the signed-in user; default: the folder's name.
        private: visibility of a new repository; None leaves it to the Hub. An existing one must agree.
        revision: an existing branch to commit to; default `main`.
        create_pr: open a pull request on `main` instead of committing to it.
        commit_message: title of the commit, and of the pull request.
        token: a Hub token; default: the one of `hf auth login` or HF_TOKEN.
        dry_run: write nothing on the Hub; only say what would go where.

    Returns:
        `repo_id`, `url`, `revision`, `commit` (hash), `pull_request` (URL, or None where there is none),
        `files` ([{`path`, `size` in bytes}], changed or not), `bytes` (their sum), `dry_run`.

    Raises:
        UserError: the folder is not a whole artifact, or the Hub or the network said no.
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
    api = HfApi(token=token or False)
    commit = pull_request = None
    try:
        with limited_waits():
            repo_id = _full_repo_id(api, repo_id or folder.resolve().name)
            if not dry_run:
                _require_sign_in(token)
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
    except (HTTPError, OSError, RuntimeError, *MALFORMED) as error:
        raise _explain(error, api.endpoint, repo_id, revision, token, create_pr) from error
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


def artifact_files(folder: Path) -> list[str]:
    """The sorted relative paths of the files that make up the artifact in `folder`; the rest is left out.

    Raises:
        UserError: the folder is missing or is not a whole artifact; names every fault.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}",
            "Give the folder that `linearize convert` wrote: linearize push ARTIFACT [REPO_ID].",
        )
    names = set()
    for path in (path for pattern in BELONGS for path in folder.glob(pattern)):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__")) for part in parts[:-1]) or parts[-1].startswith(".")
        if path.is_file() and not hidden and path.suffix not in (".partial", ".pyc"):
            names.add("/".join(parts))
    if faults := _faults(folder, names):
        raise UserError(
            f"{folder} is not a whole linearize artifact: " + "; ".join(faults),
            "`linearize convert MODEL -o DIR` writes one; an interrupted convert is finished by --resume.",
        )
    return sorted(names)


def _faults(folder: Path, names: set[str]) -> list[str]:
    """What keeps `folder` from being a whole artifact, a phrase each."""
    faults = [f"no {name}" for name in REQUIRED if name not in names]
    if not any(path.name in names for pattern in VOCABULARY for path in folder.glob(pattern)):
        faults.append("no vocabulary of the tokenizer (such as tokenizer.json)")

    json_names = ("config.json", "linearize.json", "model.safetensors.index.json")
    contents = {}
    for name in (name for name in json_names if name in names):
        try:
            contents[name] = read_object(folder / name)
        except UserError as error:
            faults.append(error.what.removeprefix(f"{folder}/"))

    if (config := contents.get("config.json")) is not None:
        if config.get("model_type") != "linearized":
            faults.append(f"config.json has model_type {config.get('model_type')!r}, not 'linearized'")
        auto_map = config.get("auto_map")
        auto_map = auto_map if isinstance(auto_map, dict) else {}
        if not any(name.startswith("AutoModel") for name in auto_map):
            faults.append("config.json has no auto_map for AutoModelForCausalLM or the like")
        modules = {f"{target.split('.')[0]}.py" for target in auto_map.values() if isinstance(target, str)}
        faults += [f"no {module}, which auto_map names" for module in sorted(modules - names)]

    faults += [f"linearize.json: {fault}" for fault in report_faults(contents.get("linearize.json", {}))]
    if recorded := contents.get("linearize.json", {}).get("checksums"):
        since = changed(recorded, folder) if isinstance(recorded, dict) else ""
        faults += (
            [f"since it was saved, {since} (`linearize seal` records changes of your own)"] if since else []
        )
    shards = contents.get("model.safetensors.index.json", {}).get("weight_map", {})
    shards = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
    faults += [f"no {shard}, which the index names" for shard in sorted(shards - names)]
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not any(name.startswith("model") for name in weights):
        faults.append("no model*.safetensors")
    for name in weights:
        try:
            # Opening compares the header with the file's size, so a file that was cut short is found.
            with safe_open(folder / name, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            faults.append(f"{name} is broken ({error})")
    return faults


def _full_repo_id(api: HfApi, repo_id: str) -> str:
    """`NAMESPACE/NAME`; a bare name belongs to the signed-in user."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} cannot name a repository",
            f"{error}\nGive one as REPO_ID: linearize push ARTIFACT NAMESPACE/NAME.",
        ) from error
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
    """Make sure that the repository exists, with the visibility that was asked for.

    A missing revision is not made: upload_folder lists the files there first, and refuses.
    """
    if revision == "main" and not (create_pr and persistent(lambda: api.repo_exists(repo_id))):
        create_repository(api, repo_id, private)
    # create_repo leaves an existing repository's visibility as it is: never publish what was to be private.
    if private is not None and persistent(lambda: api.repo_info(repo_id)).private != private:
        raise UserError(
            f"{repo_id} exists already and is {'public' if private else 'private'}",
            f"Change that in {api.endpoint}/{repo_id}/settings, or push to another name,\n"
            "or leave out --private/--no-private.",
        )


def _explain(
    error: Exception, endpoint: str, repo_id: str | None, revision: str, token: str, create_pr: bool
) -> UserError:
    """What went wrong on the way to the Hub, and what to do about it; no token in it nor in its causes."""

    def redact(text: str) -> str:
        return re.sub(r"hf_\w{8,}", "hf_...", text.replace(token, "hf_...") if token else text)

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:
        link.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in link.args)

    answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    status = answer.response.status_code if answer else None
    said = (answer and answer.server_message) or str(chain[-1]) or type(chain[-1]).__name__
    said = f"HTTP {status}, {said}" if status else said
    again = "Run the same command again: a push is one commit, and what has arrived is not sent twice."
    repo, url = repo_id or "the repository", f"{endpoint}/{repo_id}"
    if create_pr:
        again = f"See {url}/discussions first: the pull request may be open. Else run the same command again."

    if isinstance(error, RuntimeError):
        what, hint = f"the upload to {repo} broke off: {error} ({said})", again
    elif isinstance(answer, GatedRepoError):
        what = f"{repo} is gated and this account has no access"
        hint = f"Accept its terms at {url}; a fine-grained token needs access to gated repositories."
    elif isinstance(answer, RevisionNotFoundError):
        what = f"{repo} has no revision {revision}"
        hint = f"Create it with `hf repos branch create {repo} {revision}`, or leave out --revision."
    elif status == 401:
        what = "the Hub does not accept the token"
        hint = "It may be expired or mistyped: `hf auth login` again, or check --token and HF_TOKEN."
    elif isinstance(answer, RepositoryNotFoundError):
        what = f"there is no repository {repo}, or this account cannot see it"
        hint = "Check its name and the account; without --revision, push creates the repository."
    elif status == 403:
        what = f"no permission to write to {repo} ({said})"
        hint = (
            "Use a token of a member of that namespace, with write access (https://huggingface.co/settings/tokens),\n"
            "or push to a namespace of yours, or propose the files with --create-pr."
        )
    elif status:
        what = f"the Hub refused the push to {repo} ({said})"
        hint = "Correct that, then run the same command again."
        if status == 429 or status >= 500:
            hint = f"The Hub is busy or in trouble: wait.\n{again}"
    elif any(timed_out(link) for link in chain):
        what = f"the Hub at {endpoint} does not answer ({said})"
        hint = f"It is in trouble, or the network is: wait.\n{again}"
    elif any(isinstance(link, (HTTPError, ConnectionError)) for link in chain):
        what = f"the connection to the Hub at {endpoint} failed ({said})"
        hint = f"Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.\n{again}"
    elif isinstance(error, MALFORMED):
        what = (
            f"the Hub at {endpoint} answered in a form that is not the Hub's ({type(error).__name__}: {said})"
        )
        hint = f"Check HF_ENDPOINT, and whether a proxy or a login page answers in its place.\n{again}"
    else:
        what, hint = f"the push to {repo} failed ({said})", "--debug shows where."
    return UserError(" ".join(redact(what).split()), redact(hint))

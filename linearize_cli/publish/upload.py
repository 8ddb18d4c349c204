"""Uploads to the Hub. They make one commit, even if the Hub's reply is lost and a request is sent again."""

from functools import partial
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from linearize_cli.hub import persistent

MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # raised by an answer of another form


def create_repository(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Create a repository unless it exists. `private` None gives it the Hub's default visibility."""
    try:
        persistent(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    except MALFORMED:  # such as 409 without the address
        if not persistent(lambda: api.repo_exists(repo_id)):
            raise


def upload(
    api: HfApi, repo_id: str, revision: str, create_pr: bool, **options: Any
) -> tuple[CommitInfo, str | None]:
    """Upload a folder in one commit.

    A commit whose reply was lost is not made again: a branch that has the files needs no further commit, and
    a pull request that was opened is found by its title.

    Args:
        revision: the branch to commit to, if no pull request is opened.
        create_pr: open a pull request.
        options: further arguments of `HfApi.upload_folder`.

    Returns:
        the commit, and the address of the pull request or None.
    """
    send = partial(api.upload_folder, repo_id=repo_id, **options)
    to_branch = partial(persistent, paths=("/validate-yaml", "/commit/"))
    if not create_pr:
        return to_branch(lambda: send(revision=revision)), None
    name, title = persistent(api.whoami)["name"], options["commit_message"]
    before = persistent(lambda: pull_requests(api, repo_id, name, title))
    try:
        info = persistent(lambda: send(create_pr=True), paths=("/validate-yaml",))
        return info, info.pr_url
    except (HTTPError, *MALFORMED) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        opened = persistent(lambda: pull_requests(api, repo_id, name, title)) - before
        if len(opened) != 1:
            raise
    (number,) = opened
    info = to_branch(lambda: send(revision=f"refs/pr/{number}"))
    return info, f"{api.endpoint}/{repo_id}/discussions/{number}"


def pull_requests(api: HfApi, repo_id: str, author: str, title: str) -> set[int]:
    """Return the numbers of the open pull requests with this author and title."""
    found = api.get_repo_discussions(
        repo_id, author=author, discussion_type="pull_request", discussion_status="open"
    )
    return {request.num for request in found if request.title == title and request.author == author}

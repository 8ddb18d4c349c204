"""Uploads to the Hub that end: waits are limited, a request without an answer is sent again, a commit made once."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import _http

T = TypeVar("T")
TIMEOUT = {"connect": 10.0, "read": 30.0, "write": 30.0, "pool": 30.0}  # seconds
PAUSES = (1.0, 3.0)  # seconds before a request is sent again
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # what reading an answer of another form raises


@contextmanager
def limited_waits() -> Iterator[None]:
    """Limit how long `huggingface_hub` waits, which by itself waits without end."""
    factory = _http._GLOBAL_CLIENT_FACTORY

    def limit(request: Any) -> None:
        own = {
            key: value for key, value in request.extensions.get("timeout", {}).items() if value is not None
        }
        request.extensions["timeout"] = {**TIMEOUT, **own}

    def limited() -> Any:
        client = factory()
        client.event_hooks["request"].append(limit)
        return client

    set_client_factory(limited)
    try:
        yield
    finally:
        set_client_factory(factory)


def persistent(call: Callable[[], T], paths: tuple[str, ...] = ("",)) -> T:
    """Return what a call returns. If the Hub does not answer, call again, a few times.

    Args:
        paths: parts of the addresses whose requests may be sent again; all if not given. Most requests of an upload
            are sent again by `huggingface_hub` itself.
    """
    for pause in PAUSES:
        try:
            return call()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) or not any(path in str(error.request.url) for path in paths):
                raise
        time.sleep(pause)
    return call()


def timed_out(error: BaseException) -> bool:
    """Return whether an error of the HTTP client, httpx or httpx2, is that of a timeout."""
    return any(cls.__name__ == "TimeoutException" for cls in type(error).__mro__)


def create_repository(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Create a repository unless it exists."""
    try:
        persistent(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    except MALFORMED:  # such as 409 without the address
        if not persistent(lambda: api.repo_exists(repo_id)):
            raise


def upload(
    api: HfApi, repo_id: str, revision: str, create_pr: bool, **options: Any
) -> tuple[CommitInfo, str | None]:
    """Upload a folder. Return the commit, and the address of the pull request if one was asked for.

    A commit whose reply was lost is not made again: a branch that has it needs no other, and a pull request that was
    opened is found by its title.

    Args:
        options: of `HfApi.upload_folder`.
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
    """Return the numbers of an author's open pull requests with a title."""
    found = api.get_repo_discussions(
        repo_id, author=author, discussion_type="pull_request", discussion_status="open"
    )
    return {request.num for request in found if request.title == title and request.author == author}

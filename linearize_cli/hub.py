"""Access to the Hugging Face Hub: limited waits, requests that are sent again, and errors that say what to
do.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from linearize_cli.errors import UserError

T = TypeVar("T")
TIMEOUT = {"connect": 10.0, "read": 30.0, "write": 30.0, "pool": 30.0}  # seconds
PAUSES = (1.0, 3.0)  # seconds before a request is sent again
SIGN_IN = "`hf auth login` or set HF_TOKEN"


@contextmanager
def limited_waits() -> Iterator[None]:
    """Limit how long `huggingface_hub` waits for an answer, while the context is open. By itself it has no
    limit.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    factory = _http._GLOBAL_CLIENT_FACTORY

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        own = {key: value for key, value in given.items() if value is not None}
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
    """Make a call of the Hub. If it does not answer, repeat the call up to two times, after a pause.

    An error that the Hub answers is raised at once.

    Args:
        call: the function to call. Its result is returned.
        paths: parts of URLs. The call is repeated only if the failed request's URL contains one of them. By
            default it always is. Most requests of an upload are repeated by `huggingface_hub` itself.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for pause in PAUSES:
        try:
            return call()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) or not any(path in str(error.request.url) for path in paths):
                raise
        time.sleep(pause)
    return call()


def hub_error(
    error: Exception, repo: str, verb: str, instead: str, again: str, revision: str = "main", token: str = ""
) -> UserError | None:
    """Translate a failure of the Hub, or of the connection to it, into a UserError. Return None for any other
    error.

    Access tokens are removed from the error and its causes, because a traceback shows them.

    Args:
        repo: the repository's name.
        verb: what was tried: `read` or `write to`.
        instead: what to do if the repository or the permission is missing.
        again: what to do after a failure that may pass.
        revision: the branch that was used.
        token: the access token that was used. Empty if there was none.
    """
    from huggingface_hub import constants, errors

    chain = redacted_chain(error, token)
    answer = next((link for link in chain if isinstance(link, errors.HfHubHTTPError)), None)
    status, who = (answer.response.status_code, signed_in(token)) if answer else (0, "")
    said, hub = cause_of(chain, token), constants.ENDPOINT
    # httpx or httpx2, by the version of huggingface_hub
    timed_out = any(cls.__name__ == "TimeoutException" for link in chain for cls in type(link).__mro__)
    unreachable = (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError)
    if isinstance(answer, errors.GatedRepoError):
        what = f"{repo} is gated"
        hint = f"1) accept the licence at {hub}/{repo}; 2) {SIGN_IN}\n"
        hint += f"(fine-grained tokens need gated-repo read); {who}."
    elif isinstance(answer, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision}"
        hint = f"Create it with `hf repos branch create {repo} {revision}`, or leave out --revision."
    elif status == 401 and token:
        what = f"the Hub does not accept the token ({said})"
        hint = f"It may be expired or mistyped: {SIGN_IN}, or check --token; {who}."
    elif isinstance(answer, errors.RepositoryNotFoundError):
        what = f"there is no repository {repo}, or this account cannot see it"
        hint = f"Check the spelling. A private one needs a token: {SIGN_IN}; {who}.\n{instead}"
    elif status == 403:
        what = f"no permission to {verb} {repo} ({said})"
        hint = f"Check the token; {who}.\n{instead}"
    elif status:
        what = f"the Hub refused to {verb} {repo} ({said})"
        busy = status == 429 or status >= 500
        hint = f"The Hub is busy or in trouble: wait.\n{again}" if busy else f"Correct that.\n{again}"
    elif any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        what, hint = f"{repo} needs the Hub, and HF_HUB_OFFLINE is set", f"Unset it.\n{again}"
    elif timed_out:
        what = f"{repo} needs the Hub, and {hub} does not answer ({said})"
        hint = f"It is in trouble, or the network is: wait.\n{again}"
    elif any(isinstance(link, unreachable) for link in chain):
        what = f"{repo} needs the Hub, and {hub} cannot be reached ({said})"
        hint = f"Check the network and HF_ENDPOINT.\n{again}"
    else:
        return None
    return UserError(" ".join(what.split()), hint)


def signed_in(token: str) -> str:
    """Return which user an access token belongs to, as part of a sentence ("signed in as NAME")."""
    from huggingface_hub import whoami

    if not token:
        return "not signed in"
    try:
        with limited_waits():
            return f"signed in as {whoami(token)['name']}"
    except Exception:  # this only adds to a message about another failure
        return "the Hub does not know the token in use"


def redacted_chain(error: BaseException, token: str = "") -> list[BaseException]:
    """Return an error and its causes, with access tokens removed from their messages.

    Args:
        token: an access token to remove, in addition to everything of the form `hf_...`.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:
        link.args = tuple(redacted(arg, token) if isinstance(arg, str) else arg for arg in link.args)
    return chain


def cause_of(chain: list[BaseException], token: str = "") -> str:
    """Return the Hub's own message and HTTP status if a chain of errors has one, or else the message of the
    last cause.

    Args:
        chain: an error and its causes (see `redacted_chain`).
    """
    from huggingface_hub.errors import HfHubHTTPError

    answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if answer is None:
        return brief(chain[-1])
    said = redacted(answer.server_message or "", token) or brief(answer)
    return f"HTTP {answer.response.status_code}, {said}"


def brief(error: BaseException) -> str:
    """Return the first two lines of an error's message, with Hub access tokens (`hf_...`) removed."""
    return redacted(" ".join(str(error).split("\n")[:2]).strip() or type(error).__name__)


def redacted(text: str, token: str = "") -> str:
    """Return a text in which an access token, and everything of the form `hf_...`, is replaced."""
    return re.sub(r"hf_\w{8,}", "hf_...", text.replace(token, "hf_...") if token else text)

"""What the libraries say when a checkpoint cannot be had, in words that tell what to do."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager

from linearize_cli.errors import UserError
from linearize_cli.models.weights import weight_files

NAMES = "MODEL is a folder, a Hub id such as `owner/name`, or `demo`."


@contextmanager
def explained(model: str, part: str, hint: str, source: str | None = None) -> Iterator[None]:
    """Turns what other libraries raise while they load `part` of `model` into a UserError.

    Args:
        source: the folder whose weight files may be to blame.
    """
    import torch

    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"{model} does not fit into the device's memory.", "Try --dtype bfloat16.") from error
    except Exception as error:
        known = _known_cause(error, model)
        if isinstance(error, ImportError):
            hint = "Install the package that it names."
        elif source:
            known = known or _unreadable_file(source)
        raise known or UserError(f"{model}: {part} cannot be loaded: {brief(error)}", hint) from error


def _known_cause(error: Exception, model: str) -> UserError | None:
    """What the Hub refused, or the code that was not run. transformers wraps such errors: hence the chain."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:  # a traceback shows them
        link.args = tuple(_redacted(arg) if isinstance(arg, str) else arg for arg in link.args)

    answer = next((link for link in chain if isinstance(link, errors.HfHubHTTPError)), None)
    said, who = (brief(answer), _signed_in()) if answer else ("", "")
    sign_in, or_folder = "`hf auth login` or set HF_TOKEN", "or name a local folder."
    gated = f"1) accept the licence at https://huggingface.co/{model}; 2) {sign_in}\n"
    gated += f"(fine-grained tokens need gated-repo read); {who}."
    unseen = f"Check the spelling. A private model needs a token: {sign_in}; {who}."
    unreachable = (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError)
    causes = (  # the first that fits: a GatedRepoError is also a RepositoryNotFoundError
        (errors.GatedRepoError, "is gated.", gated),
        (errors.RepositoryNotFoundError, "is no folder here, nor a model that the Hub shows.", unseen),
        (errors.HFValidationError, "is neither a folder nor a Hub id.", NAMES),
        (errors.OfflineModeIsEnabled, "is not cached, and HF_HUB_OFFLINE is set.", f"Unset it, {or_folder}"),
        (errors.HfHubHTTPError, f"was refused: {said}", f"Try later, check the token ({who}), {or_folder}"),
        (unreachable, "is not cached, and the Hub cannot be reached.", f"Check the network, {or_folder}"),
    )
    for types, what, hint in causes:
        if any(isinstance(link, types) for link in chain):
            return UserError(f"{model} {what}", hint)
    if "trust_remote_code=True" in str(error):
        hint = "Read that code. If you trust it, add --trust-remote-code."
        return UserError(f"{model} needs Python code of its own, which was not run.", hint)
    return None


def _signed_in() -> str:
    from huggingface_hub import get_token, whoami

    if get_token() is None:
        return "not signed in"
    try:
        return f"signed in as {whoami()['name']}"
    except Exception:  # this line only adds to a message about another failure
        return "the Hub does not know the token in use"


def _unreadable_file(source: str) -> UserError | None:
    """Names the first weight file that cannot be read, if there is one."""
    import torch
    from safetensors import safe_open

    for file in weight_files(source):
        try:
            if file.suffix == ".bin":
                torch.load(file, map_location="meta", weights_only=True)
            else:
                safe_open(file, framework="pt")
        except pickle.UnpicklingError:
            what = f"{file} is damaged or holds Python code, which was not run."
            return UserError(what, "Take the checkpoint from a source you trust, or one in safetensors.")
        except Exception as error:  # safetensors, zipfile and torch raise types of their own
            hint = "Download it again. A Git LFS pointer (a few lines of text) wants `git lfs pull`."
            return UserError(f"{file} cannot be read: {brief(error)}", hint)
    return None


def brief(error: BaseException) -> str:
    """The start of another library's message."""
    return _redacted(" ".join(str(error).split("\n")[:2]).strip() or type(error).__name__)


def _redacted(text: str) -> str:
    """Without Hub tokens: a message may quote a request's headers."""
    return re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_***", text)

"""Errors of other libraries while a checkpoint is loaded, translated into messages that say what to do."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from linearize_cli.errors import UserError
from linearize_cli.hub import brief, hub_error, redacted_chain
from linearize_cli.models.weights import weight_files

NAMES = "MODEL is a folder, a Hub id such as `owner/name`, a GGUF file, or `demo`."


@contextmanager
def explained(model: str, part: str, hint: str, source: str | None = None) -> Iterator[None]:
    """Turn errors of other libraries into a UserError that says what to do, while the context is open.

    Args:
        model: the model's name.
        part: the part that is loaded, such as "its weights".
        hint: what to do if the cause is not known.
        source: the folder whose weight files may be the cause. None if they are not.
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
    """Translate a refusal of the Hub, an invalid name, or code that was not run into a UserError.

    Return None for any other failure.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError

    if any(isinstance(link, HFValidationError) for link in redacted_chain(error)):
        return UserError(f"{model} is neither a folder nor a Hub id.", NAMES)
    instead = "Or name a local folder. A model that is in the cache needs no Hub."
    if known := hub_error(error, model, "read", instead, instead, token=get_token() or ""):
        return known
    if "trust_remote_code=True" in str(error):
        hint = "Read that code. If you trust it, add --trust-remote-code."
        return UserError(f"{model} needs Python code of its own, which was not run.", hint)
    return None


def _unreadable_file(source: str) -> UserError | None:
    """Return an error that names the first weight file that cannot be read, or None if all can be read."""
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

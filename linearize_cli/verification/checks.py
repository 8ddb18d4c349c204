"""The tables of the checks of `verify`, by name and in the order in which they run."""

from collections.abc import Callable

from linearize_cli.verification import speed
from linearize_cli.verification.artifact import code, files, fingerprint
from linearize_cli.verification.check import Finding, Subject
from linearize_cli.verification.definition import definition
from linearize_cli.verification.drafts import drafts
from linearize_cli.verification.drift import drift
from linearize_cli.verification.forms import forms, padding, reload
from linearize_cli.verification.greedy import greedy
from linearize_cli.verification.long import long
from linearize_cli.verification.rollback import rollback
from linearize_cli.verification.rows import rows
from linearize_cli.verification.sampling import sampling
from linearize_cli.verification.tree import tree

Check = Callable[[Subject], Finding]
# Checks of the artifact's folder.
SAVED: dict[str, Check] = {"code": code, "files": files, "fingerprint": fingerprint}
# Checks of an encoder.
READING: dict[str, Check] = {"padding": padding, "reload": reload}
# Checks of a model that decodes.
DECODING: dict[str, Check] = {
    "tree": tree,
    "forms": forms,
    "greedy": greedy,
    "rollback": rollback,
    "padding": padding,
    "drift": drift,
}
# Slow checks, which --quick skips.
THOROUGH: dict[str, Check] = {
    "rows": rows,
    "drafts": drafts,
    "definition": definition,
    "long": long,
}
# Checks that are repeated on a float32 copy of a half-precision model, whose rounding would hide faults.
STRICT: dict[str, Check] = {
    "tree": tree,
    "forms": forms,
    "rollback": rollback,
    "padding": padding,
    "rows": rows,
    "definition": definition,
    "long": long,
}
# Measurements that make sense only for a model that passed the checks.
MEASURING: dict[str, Check] = {"sampling": sampling, "speed": speed.speed}

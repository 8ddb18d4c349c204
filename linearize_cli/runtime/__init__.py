"""All that a linearized model needs at inference. Importing it lets transformers load artifacts without
`trust_remote_code`.
"""

from linearize_cli.runtime.config import register as _register
from linearize_cli.runtime.model import AUTO_MODELS, LinearizeMixin, linearize

_register(*AUTO_MODELS.values())

__all__ = ["LinearizeMixin", "linearize"]

"""Run the checks of `verify` on a model in memory."""

from linearize_cli.verification.verify import verify_model

PROMPTS = ["The cat sat on the mat", "A", "1, 2,"]


def check(model, tokenizer, **kwargs):
    return verify_model(model, tokenizer, **{"prompts": PROMPTS, "max_new": 6, "quick": True, **kwargs})

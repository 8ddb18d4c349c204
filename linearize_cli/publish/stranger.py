"""A program that loads an artifact as a user without this package does: by transformers and the artifact's own
code.

`publish.gate` runs its text in a new process, in which this package cannot be imported. It reads a request as JSON
from standard input, and writes the answer as JSON to standard output:

- the request: `folder`, `auto_class`, `text`, `seed`, and `sequences`, each with its `length` and `tokens`,
- the answer: the model's `dtype`, the token ids of `text`, and `logits`, those of each sequence's `tokens` after its
  last token.

The sequences are random, as in `artifact.fingerprint`.
"""

import json
import sys
from importlib.abc import MetaPathFinder

OURS = ("linearize_cli", "linearize_kernels")


class Hidden(MetaPathFinder):
    """An import hook that makes this package look uninstalled."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def answer(request: dict) -> dict:
    """Load the artifact of a request, and return the answer."""
    import torch
    import transformers

    folder, logits = request["folder"], []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    loader = getattr(transformers, request["auto_class"])
    model = loader.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    for sequence in request["sequences"]:
        generator = torch.Generator().manual_seed(request["seed"] + sequence["length"])
        size = model.get_input_embeddings().num_embeddings, (1, sequence["length"])
        with torch.inference_mode():
            last = model(torch.randint(*size, generator=generator)).logits[0, -1]
        logits.append(last[sequence["tokens"]].float().tolist())
    ids = tokenizer(request["text"], add_special_tokens=False, verbose=False)["input_ids"]
    return {"dtype": str(model.dtype).removeprefix("torch."), "text": ids, "logits": logits}


if __name__ == "__main__":
    sys.meta_path.insert(0, Hidden())
    print(json.dumps(answer(json.load(sys.stdin))))

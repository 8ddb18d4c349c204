"""Convert an embedding model, and compare the embeddings of texts with the original's.

    python examples/embeddings.py sentence-transformers/all-MiniLM-L6-v2 text.txt -o minilm-linear

The model is trained on the first 90% of the text. Pairs of sentences, and pairs of passages, come from the
last 10%: neighbours in the text, and pieces drawn at random. Needs `pip install sentence-transformers`.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from linearize_cli import convert

PAIRS = 200
LENGTHS = {"sentences": (10, 60), "passages": (128, 256)}  # tokens


def pieces(text: str, shortest: int, longest: int, tokenizer) -> list[str]:
    """Return pieces of a text of `shortest` to `longest` tokens: sentences, joined while they are too short."""
    found, piece = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        piece = f"{piece} {sentence}".strip()
        length = len(tokenizer(piece, verbose=False)["input_ids"])
        if length >= shortest:
            found += [piece] * (length <= longest)
            piece = ""
    return found


def similarities(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of all texts, of length 1, and the cosine of each pair."""
    first, second = (
        model.encode(list(texts), normalize_embeddings=True) for texts in zip(*pairs, strict=True)
    )
    return np.concatenate([first, second]), (first * second).sum(-1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, whose correlation is Spearman's."""
    return values.argsort().argsort()


def main() -> None:
    """Convert the model and print how close its embeddings are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or Hub id of sentence-transformers")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("-o", "--output", required=True, help="the folder of the artifact")
    parser.add_argument("--tokens", type=int, default=100_000, help="training tokens")
    parser.add_argument("--window", type=int, default=16, help="size of the softmax window")
    options = parser.parse_args()
    text = options.text.read_text()
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.jsonl")  # each line of the text is a document
        data.write_text("".join(json.dumps({"text": x}) + "\n" for x in train.splitlines() if x.strip()))
        report = convert(
            options.model,
            options.output,
            overrides=(f"attention.local.size={options.window}",),
            data=(str(data),),
            tokens=options.tokens,
            seq_len=128,
        )
    print("1 - cosine on held-out blocks of the training text:", report["embedding_distance"])
    original = SentenceTransformer(options.model)
    linear = SentenceTransformer(options.output, trust_remote_code=True)
    for name, (shortest, longest) in LENGTHS.items():
        found = pieces(held_out, shortest, longest, original.tokenizer)
        rng, near = random.Random(0), list(zip(found, found[1:], strict=False))
        pairs = rng.sample(near, min(PAIRS // 2, len(near)))
        pairs += [tuple(rng.sample(found, 2)) for _ in range(PAIRS - len(pairs))]
        (a, before), (b, after) = similarities(original, pairs), similarities(linear, pairs)
        spearman = np.corrcoef(ranks(before), ranks(after))[0, 1]
        print(
            f"{len(pairs)} pairs of {name}: mean cosine {(a * b).sum(-1).mean():.4f}, Spearman {spearman:.4f}"
        )


if __name__ == "__main__":
    main()

"""Training of the model that `linearize demo` converts, from random weights, on one core in about ten minutes.

    python examples/train_demo_teacher.py --out linearize_cli/demo

It writes OUT/teacher (model and tokenizer) and OUT/heldout.jsonl. The same --seed and --steps give the same files.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize_cli.data.demo_corpus import HELDOUT_SEED, NAMES, RELATIONS, generate_documents
from linearize_cli.metrics.perplexity import perplexity
from linearize_cli.metrics.recall import recall

BOUNDARY, PAD = "<|endoftext|>", "<pad>"
WORD = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s+"
TOKENS_PER_STEP = 4096
WINDOWS = (256, 512)  # tokens of a row, the longer one for the last fifth of the steps
# The first steps train on short cues with their answers, many of them repeated. Plain documents have so few repeated
# words that recall had not emerged after 700 steps.
CUE_STEPS, CUE_WINDOW, CUE_WORDS = 300, 64, 2
LEARNING_RATE, WARMUP_STEPS = 3e-3, 100
RECALL_WEIGHT = 10.0  # weight of the loss at repeated words
HELDOUT = 100  # held-out documents


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every word of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[BOUNDARY, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in generate_documents(HELDOUT_SEED + 1, 3000))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", pair=f"{BOUNDARY} $A {BOUNDARY} $B", special_tokens=[(BOUNDARY, 0)]
    )
    # The same token is BOS and EOS, so in joined documents the BOS of the next document ends the one before.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=PAD,
        model_max_length=WINDOWS[-1],
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a small Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=WINDOWS[-1],
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def cue_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[tuple[int, bool]]]:
    """Yield rows of cues and answers, as pairs of a token and True if it repeats an earlier answer of the row."""
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    def cue(sentence: str) -> list[int]:
        before = sentence.split("{answer}")[0].replace("{who}", NAMES[0])
        return encode(" ".join(before.split()[-CUE_WORDS:]))

    relations = [
        ([cue(sentence) for sentence in r.statements + r.repeats], [encode(answer) for answer in r.answers])
        for r in RELATIONS
    ]
    while True:
        facts = [(cues, rng.choice(answers)) for cues, answers in rng.sample(relations, rng.randint(3, 8))]
        row, answered = [], set()
        while len(row) < CUE_WINDOW:
            fact = rng.randrange(len(facts))
            cues, answer = facts[fact]
            row += [(token, False) for token in rng.choice(cues)] + [
                (token, fact in answered) for token in answer
            ]
            answered.add(fact)
        yield row[:CUE_WINDOW]


def document_rows(tokenizer: PreTrainedTokenizerFast, seed: int, windows: Iterator[int]) -> Iterator[list]:
    """Yield rows of joined documents, as pairs of a token and True if it is a repeated word.

    A row starts with a whole document, so every repeated word of the row was stated in the row.
    """
    row, window = [], next(windows)
    while True:
        documents = list(generate_documents(seed, 500))
        encoded = tokenizer([document.text for document in documents])
        for number, document in enumerate(documents):
            repeated = {encoded.char_to_token(number, item.start) for item in document.recalls}
            row += [(token, place in repeated) for place, token in enumerate(encoded["input_ids"][number])]
            if len(row) >= window:
                yield row[:window]
                row, window = [], next(windows)
        seed += 1


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the ids `[rows, window]` of each step, and a tensor of the same shape with 1 at repeated words."""
    sizes = [WINDOWS[step >= 0.8 * steps] for step in range(CUE_STEPS, steps)]
    rows = document_rows(tokenizer, seed, iter([w for w in sizes for _ in range(TOKENS_PER_STEP // w)] + [0]))
    cues = cue_rows(tokenizer, seed)
    for size in [CUE_WINDOW] * CUE_STEPS + sizes:
        source = cues if size == CUE_WINDOW else rows
        yield torch.tensor(list(islice(source, TOKENS_PER_STEP // size))).unbind(-1)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Train a model with AdamW, with a larger weight for the loss at repeated words."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    begun = time.monotonic()
    for step, (ids, repeated) in enumerate(batches(tokenizer, seed, steps), start=1):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets, repeated = ids[:, 1:].flatten(), repeated[:, 1:].flatten()
        losses = cross_entropy(logits, targets, reduction="none")
        weights = 1 + (RECALL_WEIGHT - 1) * repeated
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            right = (logits.argmax(-1) == targets)[repeated.bool()].float().mean()
            left = (time.monotonic() - begun) / step * (steps - step) / 60
            click.echo(
                f"step {step}/{steps}  loss {losses.mean():.3f}  recall {right:.2f}  {left:.1f} min left",
                err=True,
            )


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate as a share of its peak: a linear warm-up, then a cosine decay to 2%."""
    return min((step + 1) / WARMUP_STEPS, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for teacher/ and heldout.jsonl."
)
@click.option("--steps", default=1500, show_default=True, help=f"Steps of {TOKENS_PER_STEP} tokens.")
@click.option("--seed", default=100_000, show_default=True, help="Seed of the weights and the training text.")
def main(out: Path, steps: int, seed: int) -> None:
    """Train the demo's teacher and measure it on held-out documents."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    click.echo(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", err=True)
    train(model, tokenizer, seed, steps)

    model.eval().save_pretrained(out / "teacher")
    tokenizer.save_pretrained(out / "teacher")
    documents = list(generate_documents(HELDOUT_SEED, HELDOUT))
    lines = (json.dumps({"text": document.text}) + "\n" for document in documents)
    (out / "heldout.jsonl").write_text("".join(lines))

    ids = torch.tensor([token for document in documents for token in tokenizer(document.text)["input_ids"]])
    for window in WINDOWS:
        blocks = ids[: len(ids) // window * window].view(-1, window)
        click.echo(f"perplexity, windows of {window}: {perplexity(model, blocks):.3f}")
    result = recall(model, tokenizer, documents)
    click.echo(f"recall: {result['accuracy']:.3f} of {result['count']}")
    for part in result["by_distance"]:
        accuracy = "-" if part["accuracy"] is None else f"{part['accuracy']:.3f}"
        click.echo(f"  {part['distance'][0]}-{part['distance'][1]} tokens: {accuracy} of {part['count']}")


if __name__ == "__main__":
    main()

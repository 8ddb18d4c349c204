"""The check `rollback`: tokens that are taken back from a cache must leave no trace.

After a crop, or a token tree of which some or no nodes are accepted, the whole cache and the next logits must
equal those of a fresh run over the tokens that were kept.
"""

import torch
from linearize_kernels.reference.visibility import ancestors
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from linearize_cli.metrics.equivalence import Comparison, run
from linearize_cli.models.decoding import Decoder, forward, pad_left
from linearize_cli.models.positions import reach
from linearize_cli.runtime.cache import ROLLBACK
from linearize_cli.verification.check import Finding, Subject, compared, is_linear, refused

STEPS = 3  # single tokens that are decoded after an accepted path


def rollback(subject: Subject) -> Finding:
    """Check that tokens which are removed from a cache leave no trace, by a crop or by a partly accepted
    token tree.

    The cache must equal that of a fresh run over the tokens that were kept.
    """
    worst, data = subject.comparison(), {}
    decoder, _, _ = subject.task.start(subject.model, list(subject.rows[:1]))
    if not compare_crops(decoder, subject.rows, subject.size, worst):
        return refused(subject, "rollback", "the cache of some layers cannot be cropped")
    if not subject.quick:
        compare_long_drafts(subject, decoder, worst)
        if subject.no_tree is None:
            compare_padded_drafts(subject, worst)
    more = ""
    if subject.no_tree is None:
        compare_trees(subject, worst)
        if not subject.quick:
            compare_single_trees(subject, worst)
    else:
        more = ", cropping alone (no token trees)"
    data["rollback"] = {"max_abs_diff": worst.diff}
    return compared("rollback", worst.diff, worst.limit, data, more)


def starts_around(size: int) -> list[int]:
    """Return lengths of prefixes that end just before the end of a window or group of `size` tokens."""
    return sorted({max(1, start) for start in (1, size - 2, 2 * size - 3)})


def compare_crops(decoder: Decoder, rows: Tensor, size: int, worst: Comparison) -> bool:
    """Compare caches that were cropped with fresh ones, for drafted tokens that cross the end of a window or
    group.

    Each case drafts tokens, crops some, drafts again, crops one, and decodes one more token. The fresh cache
    reads only the tokens that were kept.

    Args:
        rows: token ids `[B, L]`.
        size: the largest window or group of the model's layers, in tokens.
        worst: collects the differences.

    Returns:
        False if the base model has layers that cannot be cropped, else True.
    """
    cases = [(start, 4, rejected) for start in starts_around(size) for rejected in range(5)]
    cases += [(size + 1, size + 5, rejected) for rejected in (1, min(size, ROLLBACK))]
    for start, drafted, rejected in cases:
        kept = start + drafted - rejected
        if start + drafted + 4 > rows.shape[1]:
            continue
        cache = decoder.new_cache()
        decoder(rows[:, :start], cache)
        if not cache.is_croppable:
            return False
        decoder.own(cache).activate_past_recording()
        decoder(rows[:, start : start + drafted], cache)
        cache.crop(-rejected)
        compare_states(
            decoder.own(cache), decoder.own(run(decoder, rows[:, :kept], [kept])[1]), len(rows), worst
        )

        others = rows.flip(0)[:, kept : kept + 4]
        second = decoder(others[:, :3], cache)
        cache.crop(-1)
        logits = [second[:, :2], decoder(others[:, 3:], cache)]
        stayed = [rows[:, :kept], others[:, :2], others[:, 3:]]
        expected, fresh = run(decoder, torch.cat(stayed, 1), [kept + 3])
        worst.add(torch.cat(logits, 1), expected[:, -3:])
        compare_states(decoder.own(cache), decoder.own(fresh), len(rows), worst)
    return True


def compare_long_drafts(subject: Subject, decoder: Decoder, worst: Comparison) -> None:
    """Read more drafted tokens than a cache can remove again, in several forwards, and crop some of the last
    ones.

    The cache must equal a fresh one over the tokens that were kept. A crop of more tokens than it can remove
    must raise.

    Args:
        worst: collects the differences.
    """
    length = min(ROLLBACK + subject.size + 24, reach(subject.model) or 1 << 30)
    if length < ROLLBACK + 12:
        return
    ids = subject.random_tokens(1, length)
    start = length - ROLLBACK - 9
    for rejected in (7, ROLLBACK - 3):
        cache, fresh = decoder.new_cache(), decoder.new_cache()
        decoder(ids[:, :start], cache)
        decoder.own(cache).activate_past_recording()
        for part in ids[:, start : length - 1].split([ROLLBACK - 3, 2, length - 1 - start - ROLLBACK + 1], 1):
            decoder(part, cache)
        cache.crop(-rejected)
        kept = length - 1 - rejected
        decoder(ids[:, :kept], fresh)
        compare_states(decoder.own(cache), decoder.own(fresh), 1, worst)
        worst.add(decoder(ids[:, kept : kept + 1], cache), decoder(ids[:, kept : kept + 1], fresh))
    cache = decoder.new_cache()
    decoder(ids[:, :1], cache)
    decoder.own(cache).activate_past_recording()
    decoder(ids[:, 1:], cache)
    if any(is_linear(layer) for layer in decoder.own(cache).layers):
        must_raise(cache, 1 - length, worst)


def compare_padded_drafts(subject: Subject, worst: Comparison) -> None:
    """Read drafted tokens after left-padded prompts, reorder the rows, crop some tokens, and compare with
    fresh caches.

    A crop after a reset of the cache must raise.

    Args:
        worst: collects the differences.
    """
    lengths, order, drafted, rejected = (subject.size + 2, 3, 9), [2, 0, 1, 0], 6, 2
    if max(lengths) + drafted > subject.context:
        return
    ids = subject.random_tokens(3, max(lengths) + drafted)
    texts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    (prompt, mask), draft = pad_left(texts), ids[:, -drafted:]
    cache = DynamicCache(config=subject.model.config)
    cut = prompt.shape[1] - 5  # short rows still have pads there
    forward(subject.model, prompt[:, :cut], cache, mask[:, :cut])
    cache.activate_past_recording()
    forward(subject.model, prompt[:, cut:], cache, mask)
    forward(subject.model, draft, cache, pad(mask, (0, drafted), value=1))
    cache.batch_select_indices(torch.tensor(order))
    cache.crop(-rejected)
    for row, source in enumerate(order):
        text = torch.cat([texts[source], draft[source, : drafted - rejected]])
        fresh_run(subject, text, cache, row, worst)
    linear = all(is_linear(layer) for layer in cache.layers)
    if linear:  # a softmax layer keeps its length when it is reset
        forward(subject.model, draft[order], cache, pad(mask[order], (0, 2 * drafted - rejected), value=1))
        cache.reset()
        must_raise(cache, -1, worst)


def must_raise(cache: Cache, tokens: int, worst: Comparison) -> None:
    """Check that a crop of a cache raises a RuntimeError. If it does not, record the largest possible
    difference.

    Args:
        tokens: the argument of `crop`: minus the number of tokens to remove.
        worst: collects the differences.
    """
    try:
        cache.crop(tokens)
    except RuntimeError:
        return
    worst.add(torch.tensor(torch.nan), torch.tensor(0.0))


def compare_single_trees(subject: Subject, worst: Comparison) -> None:
    """Accept one path of a token tree for two rows of the same length, decode single tokens, and compare with
    fresh runs.

    The path is the first 0, 1, ... nodes of the tree's deepest path.

    Args:
        worst: collects the differences.
    """
    visible, depth = ancestors(tuple(subject.parents))
    deepest = visible[depth.argmax()].nonzero()[:, 0].tolist()
    nodes, follow = subject.random_tokens(2, len(subject.parents)), subject.random_tokens(2, STEPS)
    start = min(starts_around(subject.size)[-1], subject.context - len(deepest) - STEPS - 1)
    if start < 1:
        return
    for accepted in range(len(deepest) + 1):
        path = deepest[:accepted]
        cache, fresh = (DynamicCache(config=subject.model.config) for _ in range(2))
        forward(subject.model, subject.rows[:, :start], cache)
        subject.model.read_tree(cache, nodes, subject.parents).commit(path)
        forward(subject.model, torch.cat([subject.rows[:, :start], nodes[:, path]], 1), fresh)
        compare_states(cache, fresh, 2, worst)
        worst.add(*(forward(subject.model, follow, either) for either in (cache, fresh)))


def compare_trees(subject: Subject, worst: Comparison) -> None:
    """Verify two token trees one after the other, with rows of different lengths, and compare with fresh
    runs.

    Row i accepts the first i nodes of the first tree's deepest path. In the second tree the numbers are
    reversed. Single tokens are decoded at the end.

    Args:
        worst: collects the differences.
    """
    visible, depth = ancestors(tuple(subject.parents))
    deepest = visible[depth.argmax()].nonzero()[:, 0].tolist()
    shares = range(len(deepest) + 1)
    nodes = subject.random_tokens(len(shares), len(subject.parents))
    follow = subject.random_tokens(len(shares), STEPS)
    longest = min(subject.context, subject.rows.shape[1]) - len(deepest) - STEPS - 2
    for start in starts_around(subject.size):
        if start > longest:
            continue
        texts = [subject.rows[i % 2, : start + i % 3] for i in shares]
        ids, mask = pad_left(texts)
        cache = DynamicCache(config=subject.model.config)
        forward(subject.model, ids, cache, mask)
        for lengths in (shares, reversed(shares)):
            paths = [deepest[:length] for length in lengths]
            subject.model.read_tree(cache, nodes, subject.parents).commit(*paths)
            taken = [ids[path] for ids, path in zip(nodes, paths, strict=True)]
            texts = [torch.cat(pair) for pair in zip(texts, taken, strict=True)]
            fresh = [fresh_run(subject, text, cache, row, worst) for row, text in enumerate(texts)]
        tokens = enumerate(follow.split(1, 1))
        logits = torch.cat([continued(subject, cache, token, texts, i) for i, token in tokens], 1)
        for row, expected in enumerate(fresh):
            worst.add(logits[row], forward(subject.model, follow[row, None], expected)[0])
            compare_row(cache.layers, row, expected.layers, 0, worst)


def fresh_run(subject: Subject, text: Tensor, cache: Cache, row: int, worst: Comparison) -> Cache:
    """Read a text `[T]` alone into a new cache, and compare it with the text's row in the cache of a batch.

    Args:
        text: token ids `[T]`.
        cache: the batch's cache.
        row: the text's row in the batch.
        worst: collects the differences.

    Returns:
        The new cache.
    """
    fresh = DynamicCache(config=subject.model.config)
    forward(subject.model, text[None], fresh)
    compare_row(cache.layers, row, fresh.layers, 0, worst)
    return fresh


def continued(subject: Subject, cache: Cache, token: Tensor, texts: list[Tensor], more: int) -> Tensor:
    """Decode one token `[B, 1]` after a cache, and return its logits.

    Args:
        cache: the cache. It holds each row's text and `more` tokens after it, behind pads on the left.
        token: the token of each row.
        texts: the token ids of each row, without pads.
        more: the number of tokens in the cache after the texts.
    """
    slots = torch.arange(cache.get_seq_length() + 1, device=token.device)
    own = torch.tensor([len(text) + more + 1 for text in texts], device=token.device)
    return forward(subject.model, token, cache, (slots >= len(slots) - own[:, None]).long())


def compare_states(cache: Cache, fresh: Cache, rows: int, worst: Comparison) -> None:
    """Compare the caches of two runs over the same texts, row by row, without pads.

    Args:
        cache: the cache under test.
        fresh: the cache of a fresh run.
        rows: the number of texts.
        worst: collects the differences.
    """
    for row in range(rows):
        compare_row(cache.layers, row, fresh.layers, row, worst)


def compare_row(layers: list, row: int, fresh_layers: list, fresh_row: int, worst: Comparison) -> None:
    """Compare the cache of one row, which may follow pads, with the cache of the same row without pads.

    Args:
        layers, row: the layers of the first cache, and the row's index there.
        fresh_layers, fresh_row: the layers of the cache without pads, and the row's index there.
        worst: collects the differences.
    """
    for layer, fresh in zip(layers, fresh_layers, strict=True):
        if is_linear(fresh):
            filled = (fresh.state.recent_position[fresh_row] >= 0)[:, None]  # others are undefined
            for name, tensor in vars(fresh.state).items():
                pair = getattr(layer.state, name)[row], tensor[fresh_row]
                if name in ("recent_k", "recent_v"):
                    pair = tuple(x.where(filled, 0) for x in pair)
                if tensor.numel():
                    worst.add(*pair)
        elif isinstance(fresh, DynamicLayer):
            kept = fresh.keys.shape[-2]
            worst.add(layer.keys[row, :, -kept:], fresh.keys[fresh_row])
            worst.add(layer.values[row, :, -kept:], fresh.values[fresh_row])
        elif isinstance(fresh, LinearAttentionLayer):
            # Among these only conv caches can be cropped. A cropped one may hold more inputs than a fresh one.
            for name, tensor in fresh.conv_states.items():
                worst.add(layer.conv_states[name][row][..., -tensor.shape[-1] :], tensor[fresh_row])

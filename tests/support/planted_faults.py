"""Faults of one changed line, in every place that inference touches, and the check of `verify` that finds each."""

import inspect
import textwrap
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter

import pytest
import torch
from families import AUGMENTED
from linearize_kernels.ops.decode import ring, view_of_last
from linearize_kernels.reference.visibility import laid_out

GROUPS = {
    "local": {"scope": "group", "size": 8, "score": "relu2"},
    "far": {"feature_map": "identity"},
    "combine": "none",
    "conv": {"width": 4},
}
SEPARATE = {**AUGMENTED, "far": {"feature_map": "relu"}, "combine": "gate"}
DECAY = {"far": {"feature_map": "relu"}, "memory": {"kind": "decay"}, "combine": "rms", "sinks": 2}
DELTA = {**DECAY, "far": {"feature_map": "identity"}, "memory": {"kind": "delta"}, "sinks": 0}
CHANNELS = {**DELTA, "memory": {"kind": "delta-channels"}}
LINFORMER = {**AUGMENTED, "far": {"feature_map": "linformer", "feature_dim": 8}, "combine": "gate"}

DECODING = "linearize_kernels.ops.decode"
CHUNKED, ROWS, BLOCK, LAYOUT = (
    "linearize_kernels.ops.chunked",
    "linearize_kernels.ops.rows",
    "linearize_kernels.reference.block",
    "linearize_kernels.reference.visibility",
)
FAR, PREFILL, MEMORY = (
    "linearize_kernels.parts.far",
    "linearize_kernels.ops.prefill",
    "linearize_kernels.parts.decay",
)
CACHE, TREE, LAYER = (
    "linearize_cli.runtime.cache",
    "linearize_cli.runtime.tree",
    "linearize_cli.runtime.layer",
)
ACCEPT, DECODE = "linearize_cli.speculative.accept", "linearize_cli.speculative.decode"
DRAFTED = "(logits.double() / self.temperature).softmax(-1)[:, parents.clamp_min(0)].gather(-1, ids[..., None])[..., 0]"


@dataclass(frozen=True)
class Fault:
    """One changed line.

    Attributes:
        name: what is wrong.
        where: `module:function`, or `module:Class.method`.
        line: the sound text within the function; fault: what stands in its place.
        check: the check of `verify` that finds it.
        attention: of the converted model; family, keep and dtype: see `families.swapped`.
    """

    name: str
    where: str
    line: str
    fault: str
    check: str
    attention: dict = field(default_factory=lambda: AUGMENTED)
    family: str = "llama"
    keep: int = 0
    dtype: torch.dtype = torch.float32

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Give the function, wherever it was imported to, the code with the changed line."""
        module, _, name = self.where.partition(":")
        owner, _, method = name.rpartition(".")
        function = inspect.unwrap(attrgetter(name)(import_module(module)))
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.line) == 1, f"{self.where} has the line {source.count(self.line)} times"
        found: dict = {}
        source = source.replace(self.line, self.fault).replace("super()", f"super({owner}, self)")
        exec(source, function.__globals__, found)
        (planted,) = found.values()
        if owner:
            patch.setattr(attrgetter(owner)(import_module(module)), method, planted)
        else:
            patch.setattr(function, "__code__", inspect.unwrap(planted).__code__)


def forget_layouts() -> None:
    """Clear what is kept of layouts, which a planted fault may have made wrong."""
    for kept in (laid_out, ring, view_of_last):
        kept.cache_clear()


FAULTS = [
    # Long sequences.
    Fault(
        "a count that is off by one beyond the second segment",
        f"{CHUNKED}:chunked",
        "count = None if count is None else count + size",
        "count = None if count is None else count + size - (count >= 4096)",
        "long",
    ),
    Fault(
        "z that is not carried from segment to segment",
        f"{CHUNKED}:chunked",
        "state = after(attention, state, S, z, count,",
        "state = after(attention, state, S, z * (count < 4096), count,",
        "long",
    ),
    Fault(
        "S that is not carried from segment to segment of a group form",
        f"{CHUNKED}:chunked",
        "state = after(attention, state, S, z, count,",
        "state = after(attention, state, S * (count < 4096), z, count,",
        "long",
        GROUPS,
    ),
    Fault(
        "running sums that are wrong beyond 16 chunks",
        f"{FAR}:FeatureMemory.fold",
        "states = torch.cat([S[None], phi.transpose(-1, -2) @ cut(values)]).cumsum(0)",
        "states = torch.cat([S[None], phi.transpose(-1, -2) @ cut(values)]).cumsum(0); states[17:] *= 0.99",
        "long",
        SEPARATE,
    ),
    Fault(
        "a decayed state that is wrong beyond 16 chunks",
        f"{FAR}:FeatureMemory.fold",
        "S = decay[..., None] * S + kept[n]",
        "S = decay[..., None] * S * (1 if n < 16 else 0.99) + kept[n]",
        "long",
        DECAY,
    ),
    Fault(
        "positions that begin again at 2,048",
        f"{CHUNKED}:next_positions",
        "return count[:, None] + torch.arange(length, device=count.device)",
        "return (count[:, None] + torch.arange(length, device=count.device)) % 2048",
        "long",
        DECAY,
    ),
    Fault(
        "a cache that counts to 2,047",
        f"{CACHE}:LinearCacheLayer.append",
        "self.seen += k.shape[-2]",
        "self.seen = min(self.seen + k.shape[-2], 2047)",
        "long",
    ),
    Fault(
        "a running projection whose positions end at 2,047",
        "linearize_kernels.parts.linformer:Projection.append",
        "self.weights(position, k.dtype)",
        "self.weights(position.clamp_max(2047), k.dtype)",
        "long",
        LINFORMER,
    ),
    Fault(
        "a state whose count stops at 2,048",
        f"{PREFILL}:after",
        "else state.count + length",
        "else (state.count + length).clamp_max(2048)",
        "long",
    ),
    # Rows of a batch.
    Fault(
        "rows that are taken to be in step because the first and the last are",
        f"{CHUNKED}:rows_count",
        "min(counts) == max(counts)",
        "counts[0] == counts[-1]",
        "rows",
        SEPARATE,
    ),
    Fault(
        "rows of different lengths that are taken for the first one's",
        f"{ROWS}:rows_alike",
        "groups[key].append(row)",
        "groups[next(iter(groups), key)].append(row)",
        "rows",
    ),
    Fault(
        "groups of rows whose states stay in the order of the groups",
        f"{ROWS}:by_groups",
        "device=q.device).argsort()",
        "device=q.device).sort()[0]",
        "rows",
    ),
    Fault(
        "rows behind pads that lose their last token",
        f"{ROWS}:rows_alike",
        "slice(*span)",
        "slice(span[0], span[1] - (span[0] > 0))",
        "rows",
    ),
    Fault(
        "a long turn whose rows all have the first one's positions",
        f"{CHUNKED}:run_segment",
        "chunk, in_step)",
        "chunk, valid is None)",
        "rows",
        SEPARATE,
    ),
    Fault(
        "beams that are not put in order",
        f"{CACHE}:MappedRows.reorder_cache",
        "x.index_select(0, beam_idx.to(x.device))",
        "x",
        "rows",
    ),
    Fault(
        "rows that are repeated in another order",
        f"{CACHE}:MappedRows.batch_repeat_interleave",
        "x.repeat_interleave(repeats, 0)",
        "x.repeat(repeats, *[1] * (x.dim() - 1))",
        "rows",
    ),
    Fault(
        "rows that are selected in another order",
        f"{CACHE}:MappedRows.batch_select_indices",
        "x[indices.to(x.device)]",
        "x[indices.to(x.device).sort().values]",
        "rows",
    ),
    Fault(
        "a reset that keeps the state",
        f"{CACHE}:LinearCacheLayer.reset",
        "self.state: State | None = None",
        "self.state = getattr(self, 'state', None)",
        "rows",
    ),
    Fault(
        "a hybrid layer whose own states stay in their rows",
        f"{CACHE}:HybridCacheLayer.map",
        "for states in (self.conv_states, self.recurrent_states):",
        "for states in (self.conv_states,):",
        "rows",
        family="falcon-h1",
    ),
    Fault(
        "pads that are read from the wrong end of the mask",
        "linearize_cli.runtime.dispatch:compact_mask",
        "attention_mask[:, start : start + q_length]",
        "attention_mask[:, :q_length]",
        "rows",
    ),
    Fault(
        "pads that a hybrid reads from the mask's first columns",
        "linearize_cli.runtime.masks:valid_tokens",
        "start = first_column(mask, length, past)",
        "start = 0",
        "rows",
        keep=1,
    ),
    Fault(
        "sinks that a short row of a padded batch does not have",
        f"{LAYOUT}:behind",
        "torch.where(sinks < state.count[..., None], sinks, -1)",
        "torch.where(sinks <= state.count[..., None], sinks, -1)",
        "padding",
        SEPARATE,
    ),
    # One token after the other.
    Fault(
        "a token that is written one slot too early",
        f"{DECODING}:Decoding.write",
        "stored[:, :, eq.sinks + self.start] = new",
        "stored[:, :, eq.sinks + (self.start - 1) % eq.recent] = new",
        "forms",
    ),
    Fault(
        "a token that is overwritten before it is folded",
        f"{DECODING}:Decoding.step",
        "self.fold_oldest(attention, k, v)",
        "start = self.start; self.write(eq, k, v); self.start = start; self.fold_oldest(attention, k, v)",
        "forms",
    ),
    Fault(
        "rows that are decoded as if all were as long as the first",
        f"{DECODING}:Decoding.step",
        "self.counts = tuple(n + 1 for n in self.counts)",
        "self.counts = (self.counts[0] + 1,) * len(self.counts)",
        "rows",
    ),
    Fault(
        "sinks that are not decoded into",
        f"{DECODING}:Decoding.write",
        "if min(self.counts) < eq.sinks:",
        "if False:",
        "forms",
    ),
    Fault(
        "a ring that is read as if it began at its first slot",
        f"{DECODING}:Decoding.state",
        "columns, _ = ring(eq, self.start)",
        "columns, _ = ring(eq, 0)",
        "rollback",
    ),
    Fault(
        "conv taps that do not turn with the ring",
        f"{DECODING}:attend",
        "twice[..., eq.recent - state.start : 2 * eq.recent - state.start]",
        "twice[..., : eq.recent]",
        "forms",
    ),
    Fault(
        "groups whose mask does not turn with the ring",
        f"{DECODING}:view_of_last",
        "local[:, order]",
        "local",
        "forms",
        GROUPS,
    ),
    Fault(
        "positions of a running projection that are one too high",
        f"{DECODING}:Decoding.fold_oldest",
        "[n - eq.recent for n in self.counts]",
        "[n - eq.recent + 1 for n in self.counts]",
        "forms",
        LINFORMER,
    ),
    Fault(
        "pads that a short row folds while others fold tokens",
        f"{DECODING}:Decoding.fold_oldest",
        "if kept:",
        "if False:",
        "rows",
    ),
    # What is taken back.
    Fault(
        "a snapshot that does not move on when the record is full",
        f"{CACHE}:LinearCacheLayer.record",
        "self.snapshot = self.replay(attention, excess)",
        "self.snapshot = self.snapshot",
        "rollback",
    ),
    Fault(
        "a crop of more than is recorded",
        f"{CACHE}:LinearCacheLayer.crop",
        "if kept < 0:",
        "if kept < -99:",
        "rollback",
    ),
    Fault(
        "a path of three nodes that is not committed",
        f"{TREE}:LinearBranch.append_path",
        "self.prefix.append(self.attention, state, k, v, valid)",
        "self.prefix.append(self.attention, self.prefix.state if k.shape[-2] == 3 else state, k, v, valid)",
        "rollback",
    ),
    Fault(
        "a replay that leaves out the first token",
        f"{CACHE}:LinearCacheLayer.replay",
        "k[..., :length, :]",
        "k[..., :length, :].roll(1, -2)",
        "rollback",
    ),
    Fault(
        "softmax keys that are committed in another order",
        f"{TREE}:SoftmaxBranch.commit",
        "self.prefix.update(*new)",
        "self.prefix.update(*(x.flip(-2) for x in new))",
        "rollback",
        keep=1,
    ),
    # Trees and drafts.
    Fault(
        "a tree whose softmax layers see all nodes",
        f"{TREE}:pass_tree_mask",
        "hidden = pad(~shape.visible.to(mask.device), (prefix, 0), value=False)",
        "hidden = pad(shape.visible.to(mask.device) & False, (prefix, 0), value=False)",
        "tree",
        keep=1,
    ),
    Fault(
        "a tree without a mask of the chain's depth",
        f"{TREE}:pass_tree_mask",
        "mask = mask[:, :, depth][..., columns]",
        "mask = mask[:, :, depth]",
        "tree",
        keep=1,
    ),
    Fault(
        "a draft of which two nodes are accepted at most",
        f"{ACCEPT}:longest",
        "(reached * visible.sum(-1)).argmax(-1)",
        "(reached * visible.sum(-1)).clamp_max(3).argmax(-1)",
        "drafts",
    ),
    Fault(
        "a stop within a tree that is passed over",
        f"{DECODE}:speculate",
        "if token in stop), len(tokens))",
        "if token in stop and i == len(tokens) - 1), len(tokens))",
        "drafts",
    ),
    Fault(
        "a token after the path that is the first node's",
        f"{DECODE}:speculate",
        "following.gather(1, last[:, None])",
        "following.gather(1, last[:, None] * 0)",
        "drafts",
    ),
    # Sampling.
    Fault(
        "a draft that is accepted because it is probable",
        f"{ACCEPT}:Sampling.__call__",
        "return follows(tokens, ids, parents), tokens",
        f"return follows(tokens, ids, parents) | ({DRAFTED} > 0.5), tokens",
        "sampling",
    ),
    Fault(
        "a draft whose probability counts 1.3 times",
        f"{ACCEPT}:Sampling.__call__",
        "return follows(tokens, ids, parents), tokens",
        f"return follows(tokens, ids, parents) | (torch.rand(ids.shape) < 0.3 * {DRAFTED}), tokens",
        "sampling",
    ),
    Fault(
        "a draft that gets 2% of mass too much",
        f"{ACCEPT}:Sampling.__call__",
        "return follows(tokens, ids, parents), tokens",
        "return follows(tokens, ids, parents) | (torch.rand(ids.shape) < 0.04), tokens",
        "sampling",
    ),
    Fault(
        "sampling that ignores the temperature",
        f"{ACCEPT}:Sampling.draw",
        "logits.double() / self.temperature",
        "logits.double()",
        "sampling",
    ),
    Fault(
        "sampling that ignores top-p",
        f"{ACCEPT}:Sampling.draw",
        "if self.top_p < 1:",
        "if self.top_p < 0:",
        "sampling",
    ),
    # All fast forms, against the definition.
    Fault(
        "a window that is one token short in every form",
        "linearize_kernels.equation:Equation.near",
        "(i - j).abs() < self.size",
        "(i - j).abs() < self.size - 1",
        "definition",
        SEPARATE,
    ),
    Fault(
        "a conv whose last tap is lost in every form",
        f"{LAYOUT}:lay_out",
        "(tap < eq.conv_width)",
        "(tap < eq.conv_width - 1)",
        "definition",
        SEPARATE,
    ),
    Fault(
        "a position bias that is off by one in every form",
        f"{BLOCK}:distance_bias",
        "(delay + zero)",
        "(delay + zero + 1)",
        "definition",
        family="falcon-alibi",
    ),
    Fault(
        "keys that are folded without their weight",
        "linearize_kernels.parts.linformer:Projection.weights",
        "position % table.shape[-1]",
        "(position + 1) % table.shape[-1]",
        "definition",
        LINFORMER,
    ),
    # One form against another.
    Fault(
        "a far part that a query misses until something is folded",
        f"{LAYOUT}:lay_out",
        "any_far = far.any(-1) | folded[..., None]",
        "any_far = far.any(-1)",
        "forms",
    ),
    Fault(
        "a delta rule whose answers do not decay",
        f"{FAR}:FeatureMemory.forward",
        "answers = (passed.exp() * phi_k) @ S",
        "answers = phi_k @ S",
        "forms",
        DELTA,
    ),
    Fault(
        "channels that all decay as the first",
        f"{MEMORY}:decayed_products",
        "log_q[..., :, None, :] - log_k[..., None, :, :]",
        "log_q[..., :, None, :1] - log_k[..., None, :, :1]",
        "forms",
        CHANNELS,
    ),
    Fault(
        "a decay that leaves out the token's own",
        f"{MEMORY}:elapsed",
        "return log_decay + earlier.to(log_decay.dtype)[..., None, :, :] @ log_decay",
        "return earlier.to(log_decay.dtype)[..., None, :, :] @ log_decay",
        "forms",
        DELTA,
    ),
    Fault(
        "an open group that is not folded",
        f"{CHUNKED}:append",
        "return after(attention, state, S, z, count, k, v)",
        "return after(attention, state, state.S, z, count, k, v)",
        "rollback",
        GROUPS,
    ),
    Fault(
        "sinks that count twice",
        f"{LAYOUT}:laid_out",
        "recent = recent.masked_fill(recent < eq.sinks, -1)",
        "recent = recent.masked_fill(recent < 0, -1)",
        "forms",
    ),
    Fault(
        "a sink that is lost when a prefill is shorter than the sinks",
        f"{PREFILL}:sinks_with",
        "(count, count + k.shape[-2])",
        "(count, max(count, k.shape[-2]))",
        "rollback",
    ),
    Fault(
        "recent tokens of which a short prefill drops one",
        f"{PREFILL}:after",
        "torch.cat([old[..., length:, :], recent], -2)",
        "torch.cat([old[..., length:, :].roll(1, -2), recent], -2)",
        "rollback",
    ),
    # Half precision.
    Fault(
        "a state that is kept in the model's dtype",
        "linearize_kernels.equation:accumulator",
        "torch.float64 if dtype == torch.float64 else torch.float32",
        "dtype",
        "drift",
        SEPARATE,
        dtype=torch.bfloat16,
    ),
    # Pads elsewhere, many rows, deep trees, and what is taken back behind pads.
    Fault(
        "outputs that stay in the order of pads first",
        f"{CHUNKED}:run_segment",
        "return (out if valid is None else take(out, order.argsort(-1))), layout.final",
        "return out, layout.final",
        "rows",
    ),
    Fault(
        "many rows without a cache whose queries are too long",
        f"{CHUNKED}:chunked",
        "in_step = state is None and valid is None",
        "q, in_step = q * (1 + (len(q) > 20)), state is None and valid is None",
        "rows",
    ),
    Fault(
        "a replay that takes pads for tokens",
        f"{CACHE}:LinearCacheLayer.replay",
        "None if bool(valid.all()) else valid,",
        "None,",
        "rollback",
    ),
    Fault(
        "a record that stays when its rows move",
        f"{CACHE}:LinearCacheLayer.map",
        "self.trail = tuple(function(x) for x in self.trail)",
        "self.trail = (*map(function, self.trail[:1]), *self.trail[1:])",
        "rollback",
    ),
    Fault(
        "a snapshot that stays when its rows move",
        f"{CACHE}:LinearCacheLayer.map",
        "self.snapshot = self.snapshot.map(function)",
        "self.snapshot = self.snapshot.map(lambda x: x[:1].expand(len(function(x)), *x.shape[1:]))",
        "rollback",
    ),
    Fault(
        "a cache that cannot take tokens back",
        f"{CACHE}:LinearCacheLayer.begin",
        "self.has_previous_state[0] = self.is_initialized = True",
        "self.has_previous_state[0] = self.is_initialized = True; self.is_croppable = False",
        "rollback",
    ),
    Fault(
        "a tree that a model of states refuses",
        f"{TREE}:read_tree",
        "parents = tuple(parents)",
        "raise NotImplementedError('no trees')",
        "tree",
    ),
    Fault(
        "a chain as long as the window that is taken for near",
        f"{LAYOUT}:laid_out",
        "farthest >= eq.size",
        "farthest > eq.size",
        "tree",
    ),
    Fault(
        "one path for all rows of which only the first is committed",
        f"{TREE}:Tree.commit",
        "paths * rows if len(paths) == 1",
        "[*paths, *[[]] * (rows - 1)] if len(paths) == 1",
        "rollback",
    ),
    Fault(
        "a text that is one token longer than the context",
        f"{DECODE}:speculate",
        "min(max_new, context - len(row))",
        "min(max_new, context - len(row) + 1)",
        "drafts",
    ),
]

"""The equation over a whole sequence as dense O(T²) matrices, written from the papers in fp64.

It uses the learned tensors of a layer and nothing else of the package: the feature maps, scores, combines,
membership and conv are written out again here, one query head at a time.
"""

import torch
from torch.nn.functional import cosine_similarity


def feature(name, layer, head, x):
    """φ over `[T, D]` of one head."""
    if name == "identity":
        return x / x.norm(dim=-1, keepdim=True)
    if name == "relu":
        return x.clamp_min(0)
    y = x @ layer.weight[head]
    up, down = y.exp(), (-y).exp()
    return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], -1)


def one_head(layer, head, q, k, v, dropped, sink_logit):
    eq, length = layer.equation, q.shape[0]
    kv = head // (eq.heads // eq.kv_heads)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = j <= i
    near = {
        "sliding": i - j < eq.size,
        "group": (i // max(eq.size, 1) == j // max(eq.size, 1)) & (eq.size > 0),
    }
    local = causal & (near[eq.scope] | (j < eq.sinks))
    far = causal & ~local
    if dropped == "local":
        local = torch.zeros_like(local)
    has_far = eq.feature_map is not None and dropped != "far"
    far_weights = torch.zeros(length, length, dtype=q.dtype)
    if has_far:
        phi_q = feature(eq.feature_map, layer.q_map, head, q)
        phi_k = feature(eq.feature_map, layer.k_map, head if eq.per_query_head else kv, k)
        far_weights = (phi_q @ phi_k.T) * far

    if eq.combine == "none":
        similarity = cosine_similarity(q[:, None], k[None], dim=-1)
        weights = similarity.clamp_min(0) ** 2 * local
        if has_far:
            weights = weights + layer.combine.factor[head] * far_weights
    else:
        scores = q @ k.T * eq.scale
        if eq.softcap is not None:
            scores = eq.softcap * torch.tanh(scores / eq.softcap)
        # Plain exponentials: fp64 needs no maximum at these sizes, so stability is not assumed here.
        weights = scores.exp() * local
        if eq.combine == "lolcats":
            top = scores.masked_fill(~local, -torch.inf).amax(-1, keepdim=True)
            top = torch.where(top.isinf(), torch.zeros_like(top), top)
            gamma = torch.sigmoid(layer.combine.gamma_logit[head])
            weights = gamma * (scores - top).exp() * local
            extra = 0 if sink_logit is None else gamma * (sink_logit - top[:, 0]).exp()
        else:
            extra = 0 if sink_logit is None else sink_logit.exp()
            if layer.combine.mix is not None:
                far_weights = (
                    far_weights
                    * (q @ layer.combine.mix[head, :-1] + layer.combine.mix[head, -1]).exp()[:, None]
                )
        weights = weights + far_weights
        total = weights.sum(-1) + extra
        weights = weights / torch.where(total > 0, total, torch.ones_like(total))[:, None]
    out = weights @ v
    for t in range(length):
        for delay in range(min(eq.conv_width, t + 1)):
            out = out.index_add(0, torch.tensor([t]), (layer.conv[head, delay] * v[t - delay])[None])
    return out


def attention(layer, q, k, v, dropped=None, sink_logits=None):
    """`[B, heads, T, D], [B, kv, T, D], [B, kv, T, Dv] -> [B, heads, T, Dv]`."""
    group = layer.equation.heads // layer.equation.kv_heads
    return torch.stack([
        torch.stack([
            one_head(layer, h, q[b, h], k[b, h // group], v[b, h // group], dropped,
                     None if sink_logits is None else sink_logits[h])
            for h in range(layer.equation.heads)
        ])
        for b in range(q.shape[0])
    ])  # fmt: skip

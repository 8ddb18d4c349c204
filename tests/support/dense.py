"""The equation over a whole sequence, written from the papers in fp64: dense O(T²) weights for the local part, and
for the far part each query's own walk over its far tokens.

It uses the learned tensors of a layer and nothing else of the package: the feature maps, scores, memories, combines,
membership and conv are written out again here, one query head at a time.
"""

import math

import torch
from torch.nn.functional import cosine_similarity

BITS = 4


def feature(name, layer, head, x, scale):
    """φ over `[T, D]` of one head."""
    if name == "identity":
        return x / x.norm(dim=-1, keepdim=True)
    if name == "linear":
        return x * math.sqrt(scale)
    if name == "relu":
        return x.clamp_min(0)
    if name == "silu":
        return x / (1 + (-x).exp())
    if name == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if name == "performer":
        x = x * math.sqrt(scale)
        logs = x @ layer.directions.double() - (x * x).sum(-1, keepdim=True) / 2
        return logs.exp() / math.sqrt(layer.directions.shape[1])
    if name == "yoso":
        planes = layer.planes.double()
        hashes = planes.shape[1]
        out = torch.zeros(len(x), hashes, 2**BITS, dtype=x.dtype)
        for t in range(len(x)):
            for h in range(hashes):
                bits = [int(x[t] @ planes[:, h, b] > 0) for b in range(BITS)]
                out[t, h, sum(bit << b for b, bit in enumerate(bits))] = 1 / math.sqrt(hashes)
        return out.flatten(1)
    y = x @ layer.weight[head]
    if name == "taylor":
        y = y * math.sqrt(scale)
        pairs = torch.stack([a.outer(a).flatten() for a in y])
        return torch.cat([torch.ones(len(y), 1, dtype=y.dtype), y, pairs / math.sqrt(2)], -1)
    up, down = y.exp(), (-y).exp()
    return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], -1)


def far_part(layer, head, q, k, v, far):
    """The numerator `[T, Dv]` and mass `[T]` of one head; `far [T, T]`."""
    eq = layer.equation
    own = head if eq.per_query_head else head // (eq.heads // eq.kv_heads)
    if eq.feature_map == "linformer":
        return linformer(layer, own, q, k, v, far)
    k_map = layer.far.q_map if layer.far.k_map is None else layer.far.k_map
    phi_q = feature(eq.feature_map, layer.far.q_map, head, q, eq.scale)
    phi_k = feature(eq.feature_map, k_map, own, k, eq.scale)
    memory = layer.far.memory
    decay, strength = torch.ones(len(k), 1, dtype=q.dtype), None
    if eq.memory == "decay":
        decay = decay / (1 + memory.decay_bias[own].exp())
    elif eq.memory in ("gated", "delta"):
        decay = 1 / (1 + (v @ memory.decay_weight[own] + memory.decay_bias[own]).exp())[:, None]
    elif eq.memory in ("gated-channels", "delta-channels"):
        decay = 1 / (1 + (v @ memory.decay_weight[own] + memory.decay_bias[own]).exp())  # [T, F]
    if eq.memory.startswith("delta"):
        strength = torch.sigmoid(v @ memory.strength_weight[own] + memory.strength_bias[own])
        phi_k = phi_k / phi_k.norm(dim=-1, keepdim=True)
    if eq.key_weight:
        *w, b = layer.far.key_weight[own]
        logs = sum(w[d] * k[:, d] for d in range(len(w))) + b
        phi_k = (8 * (logs / 8).tanh()).exp()[:, None] * phi_k
    out, mass = [], []
    for i in range(len(q)):
        S, z = (
            torch.zeros(phi_k.shape[1], v.shape[1], dtype=q.dtype),
            torch.zeros(phi_k.shape[1], dtype=q.dtype),
        )
        for j in far[i].nonzero().flatten().tolist():
            if strength is None:
                S = decay[j][:, None] * S + phi_k[j].outer(v[j])
            else:
                erase = torch.eye(len(z), dtype=q.dtype) - strength[j] * phi_k[j].outer(phi_k[j])
                S = erase @ (decay[j][:, None] * S) + strength[j] * phi_k[j].outer(v[j])
            z = decay[j] * z + phi_k[j]
        out.append(phi_q[i] @ S)
        mass.append(phi_q[i] @ z)
    return torch.stack(out), torch.stack(mass)


def linformer(layer, own, q, k, v, far):
    """Softmax over slots that hold weighted means of the far keys and values."""
    table = layer.far.table[own]
    share = torch.stack([table[:, p % table.shape[1]].softmax(0) for p in range(len(k))])  # [T, slots]
    out, mass = [], []
    for i in range(len(q)):
        chosen = share * far[i][:, None]
        if not far[i].any():
            out.append(torch.zeros_like(v[0]))
            mass.append(q.new_zeros(()))
            continue
        slots = chosen / chosen.sum(0)
        weights = ((slots.T @ k) @ q[i] * layer.equation.scale).softmax(0)
        out.append(weights @ (slots.T @ v))
        mass.append(q.new_ones(()))
    return torch.stack(out), torch.stack(mass)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def one_head(layer, head, q, k, v, dropped, sink_logit):
    eq, length = layer.equation, q.shape[0]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = j <= i if eq.causal else torch.ones(length, length, dtype=torch.bool)
    near = {
        "sliding": (i - j).abs() < eq.size,
        "group": (i // max(eq.size, 1) == j // max(eq.size, 1)) & (eq.size > 0),
    }
    local = visible & (near[eq.scope] | (j < eq.sinks))
    is_far = visible & ~local
    has_far = eq.feature_map is not None and dropped != "far"
    far, mass = (
        far_part(layer, head, q, k, v, is_far) if has_far else (torch.zeros_like(v), q.new_zeros(length))
    )
    any_far = is_far.any(-1) & has_far
    if dropped == "local":
        local = torch.zeros_like(local)

    if eq.score == "softmax":
        scores = q @ k.T * eq.scale
        if eq.softcap is not None:
            scores = eq.softcap * torch.tanh(scores / eq.softcap)
        if eq.bias:
            distance = (i - j) + (0 if eq.causal else eq.size - 1)
            scores = scores + layer.distance_bias[head][distance.clamp(0, layer.distance_bias.shape[1] - 1)]
    else:
        cosine = cosine_similarity(q[:, None], k[None], dim=-1)
        if eq.score == "relu2":
            scores = cosine.clamp_min(0) ** 2
        else:
            exact = (1 - cosine.detach().clamp(-1, 1).acos() / math.pi) ** BITS
            scores = exact * (1 + BITS / 2 * (cosine - cosine.detach()))
    sink = 0 if sink_logit is None else sink_logit.exp()

    def linear_in_q(parameter):
        return q @ parameter[head, :-1] + parameter[head, -1]

    if eq.combine == "none":
        out = (scores * local) @ v
        if has_far:
            out = out + layer.combine.factor[head] * far
    elif eq.combine == "rms":
        out = layer.combine.gain[head] * rms((scores * local) @ v + far)
    elif eq.combine == "gate":
        weights = scores.exp() * local
        total = weights.sum(-1) + sink
        out = (weights @ v) / torch.where(total > 0, total, torch.ones_like(total))[:, None]
        gate = (torch.sigmoid(linear_in_q(layer.combine.gate)) * any_far)[:, None]
        out = (1 - gate) * out + gate * layer.combine.gain[head] * rms(far)
    else:
        # Plain exponentials: fp64 needs no maximum at these sizes, so stability is not assumed here.
        weights = scores.exp() * local
        if eq.combine == "lolcats":
            top = scores.masked_fill(~local, -torch.inf).amax(-1, keepdim=True)
            if sink_logit is not None:  # a logit of the local part like the others
                top = top.clamp_min(sink_logit)
            top = torch.where(top.isinf(), torch.zeros_like(top), top)
            gamma = torch.sigmoid(layer.combine.gamma_logit[head])
            weights = gamma * (scores - top).exp() * local
            sink = 0 if sink_logit is None else gamma * (sink_logit - top[:, 0]).exp()
        elif layer.combine.mix is not None:
            factor = linear_in_q(layer.combine.mix).exp()
            far, mass = factor[:, None] * far, factor * mass
        total = weights.sum(-1) + mass + sink
        out = (weights @ v + far) / torch.where(total > 0, total, torch.ones_like(total))[:, None]
    ahead = 0 if eq.causal else eq.conv_width // 2
    for t in range(length):
        for tap in range(eq.conv_width):
            source = t - (tap - ahead)
            if 0 <= source < length and (source <= t or not eq.causal):
                out = out.index_add(0, torch.tensor([t]), (layer.conv[head, tap] * v[source])[None])
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

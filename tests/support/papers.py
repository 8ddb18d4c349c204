"""Every base recipe's formula, written densely in fp64 from its paper alone, and the layers to hold against it."""

import torch
from linearize_kernels import LinearAttention

from linearize_cli.methods.registry import load_recipe
from linearize_cli.runtime.layer import equation

HEADS, DIM, VALUE_DIM, SCALE = 4, 8, 6, 0.3
EPS = 1e-6  # RMSNorm's


def layer(name, *overrides, kv_heads=HEADS, key_dim=DIM):
    recipe = load_recipe(name, overrides).to_dict()["attention"]
    geometry = dict(heads=HEADS, kv_heads=kv_heads, key_dim=key_dim, value_dim=VALUE_DIM, scale=SCALE)
    return LinearAttention(equation(recipe, geometry)).double()


def randomise(attention):
    """Learned parameters away from their start, where a forgotten one would not show."""
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return attention


def tokens(length, kv_heads=HEADS, key_dim=DIM):
    """q, k, v. With a mean: sums over random keys alone would hide a forgotten one."""
    shapes = ((HEADS, key_dim), (kv_heads, key_dim), (kv_heads, VALUE_DIM))
    return [torch.randn(1, heads, length, dim, dtype=torch.float64) + 0.5 for heads, dim in shapes]


# What the formulas take: q, k `[H, T, D]`, v `[H, T, Dv]` with KV heads repeated, the layer's learned tensors by name
# with a row per query head, and the near part's size.


def causal(scores):
    return scores.tril()


def distance(length):
    """`[T, T]` i - j."""
    return torch.arange(length)[:, None] - torch.arange(length)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def rms(x, gain):
    """RMSNorm (arXiv 1910.07467, eq. 4) of each head's output."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain[:, None]


def ratio(weights, v):
    """Weighted mean of the values; 0 where no weight is positive."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ v / total.where(total > 0, 1), 0)


def flash(q, k, v, learned, size):
    """arXiv 2202.10447, relu² within groups, linear attention to the earlier groups."""
    scores = unit(q) @ unit(k).mT
    group = torch.arange(q.shape[1]) // size
    same, earlier = group[:, None] == group, group[:, None] > group
    return (
        causal(scores.clamp_min(0) ** 2 * same) @ v
        + learned["combine.factor"][:, None, None] * (scores * earlier) @ v
    )


def flash_local(q, k, v, learned, size):
    scores = unit(q) @ unit(k).mT
    group = torch.arange(q.shape[1]) // size
    return causal(scores.clamp_min(0) ** 2 * (group[:, None] == group)) @ v


def linformer(q, k, v, learned, size):
    """arXiv 2006.04768, eq. 7: softmax(q (E K)ᵀ / √d) (E V), at each token with E over the tokens so far."""
    table = learned["far.table"]  # [H, slots, period]
    out = torch.zeros_like(v)
    for t in range(q.shape[1]):
        positions = torch.arange(t + 1) % table.shape[2]
        projection = table[:, :, positions].softmax(1)
        projection = projection / projection.sum(-1, keepdim=True)
        scores = torch.einsum("hd,hsd->hs", q[:, t], projection @ k[:, : t + 1])
        out[:, t] = torch.einsum("hs,hse->he", (SCALE * scores).softmax(-1), projection @ v[:, : t + 1])
    return out


def performer(q, k, v, learned, size):
    """arXiv 2009.14794, lemma 1: E exp(w·x - |x|²/2) exp(w·y - |y|²/2) = exp(x·y), normalised."""
    directions = learned["far.q_map.directions"]
    q, k = (x * SCALE**0.5 for x in (q, k))
    q, k = (torch.exp(x @ directions - x.square().sum(-1, keepdim=True) / 2) for x in (q, k))
    return ratio(causal(q @ k.mT), v)


def transnormer(q, k, v, learned, size):
    """arXiv 2210.10340, NormAttention: RMSNorm(φ(Q) φ(K)ᵀ V), φ = 1 + elu."""
    q, k = (torch.where(x > 0, 1 + x, x.exp()) for x in (q, k))
    return rms(causal(q @ k.mT) @ v, learned["combine.gain"])


def collisions(q, k, planes):
    """The share of hashes in which q and k fall into one bucket: same side of every plane."""
    q, k = (torch.einsum("htd,dmb->htmb", x, planes) > 0 for x in (q, k))
    return (q[:, :, None] == k[:, None]).all(-1).double().mean(-1)


def yoso(q, k, v, learned, size):
    """arXiv 2111.09714: B(Q, K) V by hash collisions, normalised in length."""
    return rms(causal(collisions(q, k, learned["far.q_map.planes"])) @ v, learned["combine.gain"])


def collision_probability(q, k):
    """arXiv 2111.09714: (1 - arccos(q̂·k̂)/π)^τ, with τ = 4 planes per hash."""
    return (1 - (unit(q) @ unit(k).mT).clamp(-1, 1).acos() / torch.pi) ** 4


def yoso_e(q, k, v, learned, size):
    near = distance(q.shape[1]) < size
    hashed = collisions(q, k, learned["far.q_map.planes"])
    weights = torch.where(near, collision_probability(q, k), hashed)
    return rms(causal(weights) @ v, learned["combine.gain"])


def retention(q, k, v, learned, size):
    """RetNet, arXiv 2307.08621, eq. 5: (QKᵀ ⊙ D) V, D_nm = γ^(n-m); eq. 8: normalised per head.

    QKᵀ with the softmax's scale here, which only the normalisation's epsilon sees.
    """
    gamma = 1 - learned["far.memory.decay_bias"].sigmoid()
    decay = gamma[:, None, None] ** distance(q.shape[1]).clamp_min(0)
    return rms(causal(SCALE * q @ k.mT * decay) @ v, learned["combine.gain"])


def softplus(x):
    return (1 + x.exp()).log()


def gate(v, learned):
    """exp(-softplus(w·v + b)), as Mamba-2's exp(-A Δ) with A = 1. `[H, T]`."""
    weight, bias = learned["far.memory.decay_weight"], learned["far.memory.decay_bias"]
    return torch.exp(-softplus(torch.einsum("htd,hd->ht", v, weight) + bias[:, None]))


def mamba2(q, k, v, learned, size):
    """arXiv 2405.21060, eq. 6: (L ⊙ C Bᵀ) X with the 1-semiseparable L_ij = a_i ... a_{j+1}."""
    a = gate(v, learned)
    length = q.shape[1]
    mask = torch.zeros(HEADS, length, length, dtype=q.dtype)
    for i in range(length):
        for j in range(i + 1):
            mask[:, i, j] = a[:, j + 1 : i + 1].prod(-1)
    return rms((mask * (SCALE * q @ k.mT)) @ v, learned["combine.gain"])


def gated_delta(q, k, v, learned, size):
    """arXiv 2412.06464, eq. 10: S_t = S_{t-1} (α_t (I - β_t k_t k_tᵀ)) + β_t v_t k_tᵀ, o_t = S_t q_t."""
    q, k, alpha = unit(q), unit(k), gate(v, learned)
    weight, bias = learned["far.memory.strength_weight"], learned["far.memory.strength_bias"]
    beta = (torch.einsum("htd,hd->ht", v, weight) + bias[:, None]).sigmoid()
    out = []
    for head in range(HEADS):
        S = torch.zeros(v.shape[2], q.shape[2], dtype=q.dtype)
        for t in range(q.shape[1]):
            b, kt, vt = beta[head, t], k[head, t, :, None], v[head, t, :, None]
            S = S @ (alpha[head, t] * (torch.eye(q.shape[2], dtype=q.dtype) - b * kt @ kt.T)) + b * vt @ kt.T
            out.append(S @ q[head, t])
    return rms(torch.stack(out).view(HEADS, q.shape[1], -1), learned["combine.gain"])


def channel_gates(v, learned):
    """exp(-softplus(Wᵀv + b)), a decay per channel: `[H, T, D]`."""
    weight, bias = learned["far.memory.decay_weight"], learned["far.memory.decay_bias"]
    return torch.exp(-softplus(torch.einsum("htd,hdf->htf", v, weight) + bias[:, None]))


def gla(q, k, v, learned, size):
    """GLA, arXiv 2312.06635, eq. 3: S_t = Diag(α_t) S_{t-1} + k_tᵀ v_t, o_t = q_t S_t.

    q and k with the root of the softmax's scale, which only the normalisation's epsilon sees.
    """
    alpha = channel_gates(v, learned)
    S, out = torch.zeros(HEADS, q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, None] * S + SCALE * k[:, t, :, None] * v[:, t, None, :]
        out.append(torch.einsum("hd,hde->he", q[:, t], S))
    return rms(torch.stack(out, 1), learned["combine.gain"])


def kda(q, k, v, learned, size):
    """KDA, arXiv 2510.26692, eq. 1: S = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ, o = S_tᵀ q_t."""
    q, k, alpha = unit(q), unit(k), channel_gates(v, learned)
    weight, bias = learned["far.memory.strength_weight"], learned["far.memory.strength_bias"]
    beta = (torch.einsum("htd,hd->ht", v, weight) + bias[:, None]).sigmoid()
    out = []
    for head in range(HEADS):
        S = torch.zeros(q.shape[2], v.shape[2], dtype=q.dtype)
        for t in range(q.shape[1]):
            b, kt, vt = beta[head, t], k[head, t, :, None], v[head, t, :, None]
            S = (torch.eye(len(kt), dtype=q.dtype) - b * kt @ kt.T) @ alpha[
                head, t
            ].diag() @ S + b * kt @ vt.T
            out.append(S.T @ q[head, t])
    return rms(torch.stack(out).view(HEADS, q.shape[1], -1), learned["combine.gain"])


def lightning(q, k, v, learned, size):
    """Lightning Attention-2, arXiv 2401.04658, eq. 2: (QKᵀ ⊙ M) V with M_ts = λ^(t-s); SiLU as in arXiv 2501.08313."""
    q, k = (x / (1 + (-x).exp()) for x in (q, k))
    decay = (1 - learned["far.memory.decay_bias"].sigmoid())[:, None, None] ** distance(q.shape[1]).clamp_min(
        0
    )
    return rms(causal(q @ k.mT * decay) @ v, learned["combine.gain"])


def hedgehog_kernel(q, k, learned):
    """arXiv 2402.04347: φ(x) = [softmax(Wᵀx), softmax(-Wᵀx)]. `[H, T, T]`."""
    q, k = q @ learned["far.q_map.weight"], k @ learned["far.k_map.weight"]
    q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k))
    return causal(q @ k.mT)


def hedgehog(q, k, v, learned, size):
    return ratio(hedgehog_kernel(q, k, learned), v)


def lolcats_over(near, q, k, v, learned):
    """arXiv 2410.10254, eq. 6: γ exp(s_ij - max over the window) near, φ(q)ᵀφ(k) beyond, one denominator."""
    near = near & (distance(q.shape[1]) >= 0)
    scores = (SCALE * q @ k.mT).masked_fill(~near, -torch.inf)
    gamma = learned["combine.gamma_logit"].sigmoid()[:, None, None]
    exact = gamma * torch.exp(scores - scores.amax(-1, keepdim=True))
    return ratio(exact + hedgehog_kernel(q, k, learned) * ~near, v)


def lolcats(q, k, v, learned, size):
    return lolcats_over(distance(q.shape[1]) < size, q, k, v, learned)


def lolcats_group(q, k, v, learned, size):
    group = torch.arange(q.shape[1]) // size
    return lolcats_over(group[:, None] == group, q, k, v, learned)


def based(q, k, v, learned, size):
    """arXiv 2402.18668, sec. 4: exp(s) as 1 + s + s²/2 on projected q and k, s with the replaced softmax's scale
    in the place of the paper's 1/√d'.
    """
    q, k = q @ learned["far.q_map.weight"], k @ learned["far.k_map.weight"]
    s = SCALE * q @ k.mT
    return ratio(causal(1 + s + s**2 / 2), v)


def relu(q, k, v, learned, size):
    """EfficientViT, arXiv 2205.14756: ReLU(q)ᵀReLU(k), normalised."""
    return ratio(causal(q.clamp_min(0) @ k.clamp_min(0).mT), v)


def window(q, k, v, learned, size):
    """StreamingLLM, arXiv 2309.17453: softmax over the first 4 tokens and the latest ones."""
    length = q.shape[1]
    seen = (distance(length) >= 0) & ((distance(length) < size) | (torch.arange(length) < 4))
    return (SCALE * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v


PAPERS = {
    "based": based,
    "flash": flash,
    "flash-local": flash_local,
    "gated-delta": gated_delta,
    "gla": gla,
    "hedgehog": hedgehog,
    "kda": kda,
    "lightning": lightning,
    "linformer": linformer,
    "lolcats": lolcats,
    "lolcats-group": lolcats_group,
    "mamba2": mamba2,
    "performer": performer,
    "relu": relu,
    "retention": retention,
    "transnormer": transnormer,
    "window": window,
    "yoso": yoso,
    "yoso-e": yoso_e,
}


def expected(name, attention, q, k, v):
    """The paper's formula on the layer's own learned tensors, `[1, H, T, Dv]`."""
    repeats = HEADS // k.shape[1]
    rows = {
        n: p if p.shape[0] == HEADS else p.repeat_interleave(repeats, 0)
        for n, p in attention.named_parameters()
    }
    k, v = (x[0].repeat_interleave(repeats, 0) for x in (k, v))
    return PAPERS[name](q[0], k, v, rows | dict(attention.named_buffers()), attention.equation.size)[None]

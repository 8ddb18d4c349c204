"""Performer's and YOSO's random features: their means, directions, gradients and seeds."""

import pytest
import torch
from linearize_kernels import chunked
from papers import DIM, SCALE, causal, collision_probability, layer, randomise, rms, tokens, unit


def vectors(count, dim):
    return torch.randn(1, count, dim, dtype=torch.float64)


def within_three_standard_errors(samples, mean):
    """samples `[N, ...]`; the seeds are fixed, so that a pass stays one."""
    error = samples.std(0) / samples.shape[0] ** 0.5
    deviation = (samples.mean(0) - mean) / error
    assert deviation.abs().max() <= 3, deviation


def estimates(features, q, k, redraws):
    """φ(q)ᵀφ(k), pair by pair, with every time other random directions."""
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(redraws):
        features.redraw(generator)
        samples.append((features(q) * features(k)).sum(-1)[0])
    return torch.stack(samples)


def test_performer_features_estimate_the_softmax_kernel_without_bias():
    torch.manual_seed(0)
    features = layer("performer", "attention.far.feature_dim=8").far.q_map
    axes = torch.eye(DIM, dtype=torch.float64)[None, [0, 1, 3, 7]]
    # Along the axes, and at random: directions that are not uniform on the sphere show along one of them.
    q, k = (torch.cat([axes, -axes, vectors(8, DIM)], 1) for _ in range(2))
    within_three_standard_errors(estimates(features, q, k, 10_000), (SCALE * (q * k).sum(-1)[0]).exp())


def test_performer_directions_are_orthogonal_within_blocks_and_of_gaussian_length():
    torch.manual_seed(0)
    directions = layer("performer", "attention.far.feature_dim=804", kv_heads=2).far.q_map.directions.T
    assert directions.shape == (804, DIM)
    for block in directions.split(DIM):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=0)
    within_three_standard_errors(directions.square().sum(-1), torch.tensor(float(DIM)))
    assert directions.norm(dim=-1).std() > 0.5, "lengths of Gaussian vectors, not one length"


def test_weighted_keys_start_at_the_softmax_kernel():
    torch.manual_seed(0)
    far = layer("augmented", "attention.far.feature_dim=2000").far
    q, k = vectors(40, DIM) / 2, vectors(40, DIM) / 2
    products = far.q_map(q) @ far.keys(k).transpose(-1, -2)
    ratio = products[0] / (SCALE * q[0] @ k[0].T).exp()
    assert 0.9 < ratio.mean() < 1.1 and ratio.std() < 0.3, (ratio.mean(), ratio.std())


@pytest.mark.parametrize("name", ["performer", "yoso", "yoso-e"])
def test_random_features_follow_the_seed_and_are_saved(name):
    def state(seed):
        torch.manual_seed(seed)
        return layer(name).state_dict()

    first, again, other = state(7), state(7), state(8)
    random = [key for key in first if key.startswith("far.")]
    assert random and all(torch.equal(first[key], again[key]) for key in random)
    assert not any(torch.equal(first[key], other[key]) for key in random)

    features, drawn = layer(name).far.q_map, []
    for seed in (7, 7, 8):
        features.redraw(torch.Generator().manual_seed(seed))
        drawn.append(next(features.buffers()).clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    torch.manual_seed(9)
    loaded = layer(name)
    loaded.load_state_dict(first)
    q, k, v = tokens(70)
    torch.manual_seed(7)
    assert torch.equal(chunked(loaded, None, q, k, v)[0], chunked(layer(name), None, q, k, v)[0])


def test_yoso_hashes_collide_as_often_as_the_paper_says():
    torch.manual_seed(0)
    features = layer("yoso", key_dim=16).far.q_map
    k = vectors(12, 16)
    q = torch.cat([k[:, :4] + 0.3 * vectors(4, 16), -k[:, 4:5] + 0.3 * vectors(1, 16), vectors(7, 16)], 1)
    probability = collision_probability(q, k)[0].diagonal()
    within_three_standard_errors(estimates(features, q, k, 3000), probability)


@pytest.mark.parametrize("dim", [16, 32, 64])
def test_yoso_s_gradient_points_along_the_expectation_s(dim):
    torch.manual_seed(0)
    features = layer("yoso", "attention.far.feature_dim=8192", key_dim=dim).far.q_map
    k, cosines = vectors(64, dim), []
    for _ in range(4):
        q, weights = vectors(1, dim).requires_grad_(), torch.randn(64, dtype=torch.float64)
        hashed = torch.zeros_like(q)
        for _ in range(8):
            features.redraw()
            hashed += torch.autograd.grad(((features(q) @ features(k).mT) * weights).sum(), q)[0]
        exact = torch.autograd.grad((collision_probability(q, k) * weights).sum(), q)[0]
        cosines.append(torch.cosine_similarity(hashed, exact, dim=-1).item())
        length = hashed.norm() / 8 / exact.norm()
        assert 0.5 < length < 1, "the paper's bound is below the exact gradient, by 0.8 or so"
    assert min(cosines) > 0.9, cosines


def test_yoso_e_within_its_window_is_the_expectation_whatever_the_hashes():
    torch.manual_seed(0)
    attention = randomise(layer("yoso-e"))
    q, k, v = tokens(64)
    near = rms(causal(collision_probability(q[0], k[0])) @ v[0], attention.combine.gain)
    for _ in range(2):
        attention.far.q_map.redraw()
        torch.testing.assert_close(chunked(attention, None, q, k, v, chunk=16)[0][0], near)


def test_yoso_e_s_local_gradient_is_the_paper_s_bounded_one():
    """arXiv 2111.09714: τ/2 (1 - arccos(q̂·k̂)/π)^τ in the place of a derivative without limit at q̂ = k̂."""
    torch.manual_seed(0)
    score = layer("yoso-e").score
    q, k = vectors(5, DIM).requires_grad_(), vectors(7, DIM)
    k[:, 0] = q[:, 0].detach()
    towards = torch.randn(1, 5, 7, dtype=torch.float64)
    ours = torch.autograd.grad(score(q, k, SCALE, None), q, towards)[0]
    cosine = unit(q) @ unit(k).mT
    slope = 2 * collision_probability(q, k).detach()
    torch.testing.assert_close(ours, torch.autograd.grad(cosine, q, towards * slope)[0])

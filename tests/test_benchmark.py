"""The benchmark scripts: the exact gradients of docs/math.md, and the report on runs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

from marginals import toy_gradient, toy_return, toy_reward, toy_scores, toy_step  # noqa: E402

torch.set_num_threads(1)
WEIGHTS = torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.3, 0.1], [0.2, 0.2]]).double()  # (K, 2)


def hybrid(K):
    return [(k,) for k in range(K)]


def two_layer(K):
    return [tuple(range(K))]


def drawn_only(noisy_steps, K):
    return noisy_steps


@pytest.mark.parametrize("noisy_steps", [(), (0,), (2,), (0, 1, 2, 3)])
def test_exact_return_is_the_mean_of_samples(noisy_steps, n=400_000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator).double()
    for k in range(4):
        mu, std = toy_step(x, k, 4, 0.7 if k in noisy_steps else 0.0, WEIGHTS)
        x = mu + std * torch.randn(n, generator=generator).double()
    reward = toy_reward(x)
    error = (reward.std() / n**0.5).item()
    assert error < 1e-3 and abs(toy_return(4, 0.7, noisy_steps, WEIGHTS) - reward.mean()) < 4 * error


@pytest.mark.parametrize("K, a", [(1, 0.5), (2, 0.5), (3, 0.7), (4, 0.5), (4, 1.0)])
def test_two_layer_score_terms_are_the_whole_gradient(K, a):
    assert toy_scores(K, a, two_layer(K))[0] == pytest.approx(toy_gradient(K, a, two_layer(K)), abs=1e-6)


@pytest.mark.parametrize("K, a", [(2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0), (10, 0.5)])
def test_hybrid_score_term_is_the_part_through_the_drawn_step(K, a):
    score, exact = toy_scores(K, a, hybrid(K))[0], toy_gradient(K, a, hybrid(K))
    assert score == pytest.approx(toy_gradient(K, a, hybrid(K), drawn_only), abs=1e-6)
    assert np.linalg.norm(score) < 0.6 * np.linalg.norm(exact)


def test_hybrid_score_term_is_a_kth_of_the_gradient():
    """In nearly its direction with the paper's K = 4 and a = 0.5, but not where K is 2 and a is 1."""
    for K, factor in ((4, 1.15), (10, 1.15)):
        score, exact = toy_scores(K, 0.5, hybrid(K))[0], toy_gradient(K, 0.5, hybrid(K))
        assert (1 / K < score / exact).all() and (score / exact < factor / K).all()
        assert score @ exact > 0.999 * np.linalg.norm(score) * np.linalg.norm(exact)
    score, exact = toy_scores(2, 1.0, hybrid(2))[0], toy_gradient(2, 1.0, hybrid(2))
    assert score @ exact < 0.8 * np.linalg.norm(score) * np.linalg.norm(exact)

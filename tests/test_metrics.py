"""Distances of sets of pictures against closed forms."""

import pytest
import torch
from torch.nn import functional as F

from rapm.evaluate.metrics import (
    frechet,
    frechet_distance,
    kernel,
    mean,
    pair_distances,
    sharpness,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, covariance, seed=0, n=500):
    """A set [n, d] whose own mean and covariance are these, not only in expectation."""
    x = random(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_frechet_distance_of_diagonal_gaussians():
    """|mu_a - mu_b|^2 + sum (s_a - s_b)^2 = 9 + 16 + 1 + 4 + 0."""
    a = exactly(torch.tensor([0.0, 0, 1]), torch.diag(torch.tensor([1.0, 9, 4]).double()))
    b = exactly(torch.tensor([3.0, 4, 1]), torch.diag(torch.tensor([4.0, 1, 4]).double()), seed=1)
    assert frechet_distance(a, b) == pytest.approx(30, rel=1e-9)


def test_frechet_distance_of_samples_converges_to_it():
    a = random(200_000, 3) * torch.tensor([1.0, 3, 2])
    b = random(200_000, 3, seed=1) * torch.tensor([2.0, 1, 2]) + torch.tensor([3.0, 4, 0])
    assert frechet_distance(a.float(), b.float()) == pytest.approx(30, rel=0.01)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr (C_a C_b)^(1/2) = (tr C_a C_b + 2 (det C_a det C_b)^(1/2))^(1/2)."""
    ca, cb = torch.tensor([[2.0, 1], [1, 3]]).double(), torch.tensor([[4.0, -1], [-1, 1]]).double()
    zero = torch.zeros(2)
    root = ((ca @ cb).trace() + 2 * (ca.det() * cb.det()).sqrt()).sqrt()
    expected = float(ca.trace() + cb.trace() - 2 * root)
    assert frechet_distance(exactly(zero, ca), exactly(zero, cb, seed=1)) == pytest.approx(
        expected, rel=1e-9
    )


def test_frechet_distance_is_a_distance_of_sets():
    mix = random(5, 5, seed=2)
    a, b = random(300, 5) @ mix + 1, random(200, 5, seed=1)
    rotation = torch.linalg.qr(random(5, 5, seed=3)).Q
    distance = frechet_distance(a, b)
    assert distance > 1
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_with_fewer_pictures_than_features():
    """Covariances without full rank: still finite, and zero for equal sets."""
    a = random(8, 20)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_interval_of_a_mean_is_its_standard_error():
    """The bootstrap of a mean has a closed form: s / sqrt(n)."""
    values = random(4000)
    score = mean(values)
    assert score.value == pytest.approx(float(values.mean()), rel=1e-9)
    expected = 1.96 * float(values.std()) / 4000**0.5
    assert score.high - score.value == pytest.approx(expected, rel=0.3)  # of 50 resamples
    assert score.value - score.low == pytest.approx(score.high - score.value)
    assert mean(values) == score


@pytest.mark.parametrize(("n", "d"), [(400, 4), (320, 64), (640, 64)])
def test_the_interval_of_fid_is_what_other_sets_have(n, d):
    """Held against FID of fresh sets of the same two distributions; features of unequal strength,
    as networks have them."""
    strength = 1 / torch.arange(1, d + 1).double().sqrt()
    b = random(n, d, seed=1) * strength

    def drawn(seed):
        return random(n, d, seed=seed) * strength * 1.3 + 0.1 * strength

    deviation = float(torch.tensor([frechet_distance(drawn(k), b) for k in range(2, 62)]).std())
    score = frechet(drawn(0), b)
    assert score.value == pytest.approx(frechet_distance(drawn(0), b))
    assert (score.high - score.value) / 1.96 == pytest.approx(deviation, rel=0.35)


def test_kernel_distance_is_the_sum_over_all_pairs():
    """By hand, pair by pair, of small sets; of equal distributions it is unbiased around 0."""
    a, b = random(5, 3), random(4, 3, seed=1) + 0.5
    k = lambda x, y: float(((x * y).sum() / 3 + 1) ** 3)  # noqa: E731
    same = lambda x: [k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]  # noqa: E731
    across = [k(p, q) for p in a for q in b]
    expected = sum(same(a)) / 20 + sum(same(b)) / 12 - 2 * sum(across) / 20
    assert kernel(a, b).value == pytest.approx(expected, rel=1e-9)
    zero = [kernel(random(100, 3, seed=k), random(100, 3, seed=99)) for k in range(40)]
    middle = torch.tensor([score.value for score in zero])
    assert abs(float(middle.mean())) < 0.2


def test_the_interval_of_a_kernel_distance_is_what_other_sets_have():
    b = random(300, 4, seed=1)
    found = [kernel(random(300, 4, seed=2 + k) + 0.5, b).value for k in range(60)]
    score = kernel(random(300, 4) + 0.5, b)
    deviation = float(torch.tensor(found).std())
    assert (score.high - score.value) / 1.96 == pytest.approx(deviation, rel=0.35)


def test_pair_distances_by_hand():
    a, b = torch.tensor([[0.0, 0], [1, 1], [2, 0]]), torch.tensor([[3.0, 4], [1, 1], [2, 1]])
    assert pair_distances(a, b).tolist() == [5, 0, 1]


def checkerboard(size):
    return (torch.arange(size) + torch.arange(size)[:, None]).remainder(2) * 2.0 - 1


def test_sharpness_by_hand():
    """A checkerboard's Laplacian is -8 times itself: four times +-8, variance 4 x 64 / 3. Colours
    that cancel are grey."""
    board = checkerboard(4).expand(3, 4, 4)
    flat = torch.full((3, 4, 4), 0.3)
    colourful = torch.stack([checkerboard(4), -checkerboard(4), torch.zeros(4, 4)])
    expected = torch.tensor([256 / 3, 0, 0])
    torch.testing.assert_close(
        sharpness(torch.stack([board, flat, colourful])), expected, rtol=1e-6, atol=1e-9
    )


def test_sharpness_falls_under_blur():
    picture = random(1, 3, 32, 32).float().clamp(-1, 1)
    values = [float(sharpness(F.avg_pool2d(picture, size, stride=1))) for size in (1, 2, 3, 5)]
    assert values == sorted(values, reverse=True)
    assert values[1] < values[0] / 2

"""Distances between sets of pictures, and of one set by itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Score:
    """A number and its 95 % interval: what other captions and seeds would have made of it."""

    value: float
    low: float
    high: float


RESAMPLES = 200


def mean(values: Tensor) -> Score:
    """Of a value a picture, [n], with its interval by the bootstrap over pictures: 1.96 standard
    deviations of the resamples' means to either side."""
    values, generator = values.double(), torch.Generator().manual_seed(0)
    draws = (
        torch.randint(len(values), (len(values),), generator=generator) for _ in range(RESAMPLES)
    )
    apart = 1.96 * statistics.stdev(float(values[rows].mean()) for rows in draws)
    value = float(values.mean())
    return Score(value, value - apart, value + apart)


def _of_influences(value: float, influences: Tensor) -> Score:
    """A measure of a set, with the interval of the mean that it is to first order.

    Resamples of the measure itself would mislead where there are few more pictures than features: a
    resample has pictures twice, so its covariance has a lower rank.

    Args:
        influences: of each picture, [n]: how the measure changes with that picture's share.
    """
    around = mean(influences)
    apart = around.high - around.value
    return Score(value, value - apart, value + apart)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """:func:`frechet` without its interval."""
    return frechet(a, b).value


def frechet(a: Tensor, b: Tensor) -> Score:
    """Frechet distance of the Gaussians fitted to two sets of features (FID, arXiv 1706.08500, eq.
    6), with its interval for b, the reference, as it is.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is the sum of the
    roots of the eigenvalues of M = C_b^(1/2) C_a C_b^(1/2), which is symmetric, so no complex
    numbers arise. Its derivative by C_a is 1 - T, T = C_b^(1/2) M^(-1/2) C_b^(1/2) being the linear
    map that carries one Gaussian to the other.

    Args:
        a, b: features [n, d], n > d for a meaningful covariance.
    """
    a, b = a.double(), b.double()
    apart, own, reference = a.mean(0) - b.mean(0), a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(reference)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    values, vectors = torch.linalg.eigh(root @ own @ root)
    values = values.clamp(min=0)
    value = apart.square().sum() + own.trace() + reference.trace() - 2 * values.sqrt().sum()
    there = values > values.max() * 1e-12
    half = root @ vectors[:, there] * values[there].pow(-0.25)
    centred = a - a.mean(0)
    bent = centred.square().sum(1) - (centred @ half).square().sum(1)
    return _of_influences(float(value), 2 * centred @ apart + bent)


def kernel(a: Tensor, b: Tensor) -> Score:
    """Kernel distance of two sets of features (KID, arXiv 1801.01401): the unbiased square of the
    maximum mean discrepancy under the kernel (x y / d + 1)^3, over all pairs.

    Its interval is for b as it is.

    Args:
        a, b: features [n, d] and [m, d].
    """
    a, b, n, m = a.double(), b.double(), len(a), len(b)

    def sums(x: Tensor, y: Tensor) -> Tensor:
        """For each row of x, over all of y."""
        parts = (((part @ y.T) / x.shape[1] + 1).pow(3).sum(1) for part in x.split(1024))
        return torch.cat([*parts])

    def itself(x: Tensor) -> Tensor:
        return (x.square().sum(1) / x.shape[1] + 1).pow(3)

    own, others = (sums(a, a) - itself(a)) / (n - 1), sums(a, b) / m
    theirs = float((sums(b, b) - itself(b)).sum() / (m * (m - 1)))
    value = float((own - 2 * others).mean()) + theirs
    return _of_influences(value, 2 * (own - others))


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance between row i of a and row i of b, [n, d] each: two seeds of one
    caption."""
    return (a - b).norm(dim=1)


def sharpness(images: Tensor) -> Tensor:
    """Variance of the Laplacian of the grey picture, [n]; images [n, 3, H, W] in [-1, 1]."""
    grey = images.mean(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device).reshape(
        1, 1, 3, 3
    )
    return F.conv2d(grey, kernel).flatten(1).var(1)


def brightness(images: Tensor) -> Tensor:
    """Mean of all values, in [0, 1], of each picture: [n]; images [n, 3, H, W] in [-1, 1]."""
    return (images.flatten(1).mean(1) + 1) / 2


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of all values of each picture, [n]; images [n, 3, H, W]."""
    return images.flatten(1).std(1)


def layout_distance(a: Tensor, b: Tensor) -> float:
    """How far what is where differs, between pictures [n, 3, H, W] and their partners: the root of
    the mean square difference of their 16 x 16 averages."""
    apart = F.adaptive_avg_pool2d(a, 16) - F.adaptive_avg_pool2d(b, 16)
    return float(apart.square().mean().sqrt())

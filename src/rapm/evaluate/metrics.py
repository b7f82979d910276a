"""Distances between sets of pictures, and of one set by itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable
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

    def per(self, whole: float) -> Score:
        """As a share."""
        return Score(self.value / whole, self.low / whole, self.high / whole)


RESAMPLES = 50


def bootstrapped(measure: Callable[[Tensor], float], count: int) -> Score:
    """A measure of ``count`` pictures, and its interval by the bootstrap over pictures.

    The interval is 1.96 standard deviations of the resamples wide to either side. Its middle is the
    measure itself, because FID of a resample, which has pictures twice, is biased upwards.

    Args:
        measure: of the pictures with these numbers, int [count].
    """
    generator = torch.Generator().manual_seed(0)
    again = (torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES))
    apart = 1.96 * statistics.stdev(map(measure, again))
    value = measure(torch.arange(count))
    return Score(value, value - apart, value + apart)


def mean(values: Tensor) -> Score:
    """Of a value a picture, [n], with its interval."""
    return bootstrapped(lambda rows: float(values[rows].mean()), len(values))


def frechet(a: Tensor, b: Tensor) -> Score:
    """:func:`frechet_distance` with its interval; b, the reference, is taken as it is."""
    distance_to, a = _frechet_to(b), a.double()
    return bootstrapped(lambda rows: distance_to(a[rows]), len(a))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (FID, arXiv 1706.08500, eq.
    6).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is the sum of the
    roots of the eigenvalues of C_b^(1/2) C_a C_b^(1/2), which is symmetric, so no complex numbers
    arise.

    Args:
        a, b: features [n, d], n > d for a meaningful covariance.
    """
    return _frechet_to(b)(a)


def _frechet_to(b: Tensor) -> Callable[[Tensor], float]:
    """The distance of any set of features from b."""
    b = b.double()
    middle, covariance = b.mean(0), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(a: Tensor) -> float:
        a = a.double()
        own = a.T.cov()
        cross = torch.linalg.eigvalsh(root @ own @ root).clamp(min=0).sqrt().sum()
        apart = (a.mean(0) - middle).square().sum()
        return float(apart + own.trace() + covariance.trace() - 2 * cross)

    return distance


def kernel(a: Tensor, b: Tensor) -> Score:
    """Kernel distance of two sets of features (KID, arXiv 1801.01401): the unbiased square of the
    maximum mean discrepancy under the kernel (x y / d + 1)^3, over all pairs.

    Its interval is that of the mean that it is, to first order in a's pictures.

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
    first_order = mean(2 * (own - others))
    apart = first_order.high - first_order.value
    return Score(value, value - apart, value + apart)


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

"""Distances between sets of pictures, and of one set by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (FID, arXiv 1706.08500, eq.
    6).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is the sum of the
    roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric, so no complex numbers
    arise.

    Args:
        a, b: features [n, d], n > d for a meaningful covariance.
    """
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float(mean + a.T.cov().trace() + b.T.cov().trace() - 2 * cross)


def pair_distance(a: Tensor, b: Tensor) -> float:
    """Mean Euclidean distance between row i of a and row i of b, [n, d] each: two seeds of one
    caption."""
    return float((a - b).norm(dim=1).mean())


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

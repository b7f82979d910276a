"""Distances between positions, adversarial losses over logits, and their weighting. Tensors only.

Every function returns one number a row, [B]; methods decide how rows and slots are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """d(a, b) = mean of sqrt((a - b)^2 + c^2) - c over everything but the batch. Returns [B]."""
    return (((a - b).square() + c * c).sqrt() - c).flatten(1).mean(1)


def _over_heads(maps: Sequence[Tensor]) -> Tensor:
    """Mean over a map, then over heads: each head counts the same, however large its map."""
    return torch.stack([x.flatten(1).mean(1) for x in maps]).mean(0)


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean of relu(1 - real) + relu(1 + fake): 2 is chance. PCM's form (arXiv 2405.18407).

    Args:
        real, fake: each head's logits, [B, 1, h, w].
    """
    return _over_heads([F.relu(1 - r) + F.relu(1 + f) for r, f in zip(real, fake, strict=True)])


def hinge_student(fake: Sequence[Tensor]) -> Tensor:
    """Mean of relu(1 - fake): PCM's form, which stops pushing where the discriminator is fooled."""
    return _over_heads([F.relu(1 - f) for f in fake])


def relativistic(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """softplus(fake - real) of each head's mean logits; log 2 is chance (arXiv 1807.00734).

    The discriminator's loss; with real and fake exchanged, the student's.
    """
    means = [(f - r).flatten(1).mean(1) for r, f in zip(real, fake, strict=True)]
    return torch.stack([F.softplus(m) for m in means]).mean(0)


def margin(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean of real - fake: 0 where a discriminator stands at chance."""
    return _over_heads([r - f for r, f in zip(real, fake, strict=True)])


def with_length_of(gradient: Tensor, like: Tensor) -> Tensor:
    """``gradient`` with the norm of ``like``, row by row: the adaptive weight. Both [B, C, H, W].

    The idea of VQGAN (arXiv 2012.09841, equation 7), at the student's position instead of a
    decoder's last layer. Zeros stay zeros: norms below 1e-12 count as 1e-12.
    """
    have, want = (x.flatten(1).norm(dim=1)[:, None, None, None] for x in (gradient, like))
    return gradient * (want / have.clamp(min=1e-12))

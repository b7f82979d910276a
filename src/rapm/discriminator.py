"""Small heads over the features tapped inside the frozen network: what makes a critic of a LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """Reads one feature map: two [conv 1x1, GroupNorm, LeakyReLU] with a residual, then one channel
    (PCM's head for SDXL).

    A projection to ``width`` comes first, so that a head costs the same whatever the network's
    width.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(2)])
        self.norms = nn.ModuleList(
            [nn.GroupNorm(math.gcd(32, width // 4), width) for _ in range(2)]
        )
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map [B, C, h, w] to logits [B, 1, h, w]."""
        x = self.project(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.leaky_relu(norm(conv(x)), 0.2)
        return self.out(x)


class Heads(nn.Module):
    """One head for each tapped feature map. Float32.

    Args:
        channels: of each feature map.
        width: of each head.
        seed: of the first weights.
    """

    def __init__(self, channels: Sequence[int], width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList([Head(c, width) for c in channels])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps [B, C, h, w] to logits [B, 1, h, w] each."""
        return [head(x) for head, x in zip(self.heads, features, strict=True)]

"""The oracle of the toy data set: a small network that reads a scene back out of a picture.

It serves two ends. Its *reading* (number of objects, each one's colour and shape, the ground) gives
caption accuracy, the toy world's CLIP score. Its *features* serve FID and diversity: 64 numbers of
the trunk, into which the pooled statistics of every level flow and which are trained to tell how
much blur, noise, ghost and loss of contrast a picture has suffered; and 9 numbers that no training
can make blind to sharpness, the strength of the finest detail at three scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapm.io import load_tensors
from rapm.toy.scenes import GROUNDS, KINDS, parse_caption

TRUNK = 64
FEATURES = TRUNK + 9
MAX_COUNT = 4
DAMAGES = ("blur", "noise", "ghost", "contrast")


@dataclass(frozen=True)
class Reading:
    """Logits read from n pictures: count [n, 5], ground [n, 4], kinds [n, 48] (each there or not);
    damage [n, 4], in [0, 1]."""

    count: Tensor
    ground: Tensor
    kinds: Tensor
    damage: Tensor


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


def detail(images: Tensor) -> Tensor:
    """Log of the deviation of what a 3 x 3 mean takes away, for each colour at scales 1, 2 and 4.
    [n, 3, H, W] to [n, 9]."""
    scales = [F.avg_pool2d(images, scale) for scale in (1, 2, 4)]
    fine = [x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1) for x in scales]
    return torch.cat([(x.std((2, 3)) + 1e-4).log() for x in fine], 1)


class Oracle(nn.Module):
    """Reads pictures, float [n, 3, 64, 64] in [-1, 1]."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # No normalisation before the first statistics: contrast and sharpness would be normalised
        # away.
        self.stem = nn.Conv2d(3, 24, 3, 1, 1)
        self.low = nn.Sequential(_conv(24, 48, 2), _conv(48, 48))
        self.middle = nn.Sequential(_conv(48, 96, 2), _conv(96, 96))
        self.high = nn.Sequential(_conv(96, 128, 2), _conv(128, 128))
        self.kinds = nn.Conv2d(128, len(KINDS), 1)
        self.trunk = nn.Sequential(
            nn.Linear(2 * (24 + 48 + 96 + 128), 256), nn.SiLU(), nn.Linear(256, TRUNK)
        )
        self.heads = nn.ModuleDict(
            {
                "count": nn.Linear(TRUNK, MAX_COUNT + 1),
                "ground": nn.Linear(TRUNK, len(GROUNDS)),
                "kinds": nn.Linear(TRUNK, len(KINDS)),
                "damage": nn.Linear(TRUNK, len(DAMAGES)),
            }
        )
        # Mean and spread of the features over fresh renders, so that every feature weighs the same
        # in a distance.
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_std", torch.ones(FEATURES))

    def forward(self, images: Tensor) -> tuple[Reading, Tensor]:
        """Returns the reading and the trunk's features [n, 64]."""
        levels = [F.leaky_relu(self.stem(images), 0.1)]
        for stage in (self.low, self.middle, self.high):
            levels.append(stage(levels[-1]))
        pooled = [statistic for x in levels for statistic in (x.mean((2, 3)), x.std((2, 3)))]
        features = self.trunk(torch.cat(pooled, 1))
        hidden = F.silu(features)
        # Colour and shape belong together in one place: each of 8 x 8 cells votes, the loudest is
        # heard.
        kinds = torch.logsumexp(self.kinds(levels[-1]).flatten(2), 2) + 0.1 * self.heads["kinds"](
            hidden
        )
        reading = Reading(
            self.heads["count"](hidden),
            self.heads["ground"](hidden),
            kinds,
            self.heads["damage"](hidden),
        )
        return reading, features

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """Standardised features, float [n, 73]: mean 0 and variance 1 over fresh renders."""
        raw = torch.cat(
            [torch.cat([self(batch)[1], detail(batch)], 1) for batch in images.split(batch_size)]
        )
        return (raw - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def is_right(self, images: Tensor, captions: Sequence[str], batch_size: int = 128) -> Tensor:
        """Whether each picture shows what its caption says: ground, count and every (colour,
        shape).

        Args:
            images: float [n, 3, 64, 64] in [-1, 1].
            captions: n captions of the toy world.

        Returns:
            bool [n].
        """
        verdicts = []
        for start in range(0, len(images), batch_size):
            reading, _ = self(images[start : start + batch_size])
            for i, caption in enumerate(captions[start : start + batch_size]):
                ground, kinds = parse_caption(caption)
                seen = (reading.kinds[i] > 0).nonzero().flatten().tolist()
                verdicts.append(
                    GROUNDS[int(reading.ground[i].argmax())] == ground
                    and int(reading.count[i].argmax()) == len(kinds)
                    and seen == kinds
                )
        return torch.tensor(verdicts)

    @classmethod
    def load(cls, file: Path) -> Oracle:
        oracle = cls()
        oracle.load_state_dict({key: value.float() for key, value in load_tensors(file).items()})
        return oracle.eval().requires_grad_(False)

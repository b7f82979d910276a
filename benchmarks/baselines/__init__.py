"""Other methods, restated from their papers and published code: what RAPM is measured against.

Each is a :class:`rapm.methods.base.Method`; :func:`rapm.train.train` runs it. Every method trains
the same LoRA on the same network, at N positions an iteration, one in each slot, as RAPM does.
Where a paper takes pictures, the method gets rendered scenes in the VAE's latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rapm.config import Config
from rapm.methods.base import Method, Store
from rapm.network import Backbone
from rapm.sampling import Conditioning, repeat
from rapm.schedule import Grid, Schedule


@dataclass(frozen=True)
class Pictures:
    """Clean latents of real pictures, [n, C, H, W], and their captions' conditioning, [n, ...]."""

    latents: Tensor
    conditioning: Conditioning

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Conditioning]:
        """Some of them, [count, C, H, W], and what belongs to them."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        own = {name: value[chosen] for name, value in self.conditioning.items()}
        return self.latents[chosen], own


class Baseline(Method):
    """Another paper's method."""

    stores_positions: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    """Whether its student is sampled by predicting the clean latent and adding noise again."""


class Drawn(NamedTuple):
    """What an iteration draws first: B pictures, and where each slot starts.

    Attributes:
        x0, prompts: the pictures, [B, C, H, W], and their captions, [B, ...].
        fine: int [N, B], the fine step that a slot's row starts at; 0 is pure noise.
        noise: [N, B, C, H, W].
    """

    x0: Tensor
    prompts: Conditioning
    fine: Tensor
    noise: Tensor


class Start(NamedTuple):
    """Of k slots, [k B, ...]: a position, its timestep t, and where one fine step leads from t."""

    z: Tensor
    t: Tensor
    after: Tensor
    prompts: Conditioning


class OfPictures(Baseline):
    """A method that starts from pictures with noise added up to a fine step inside each slot.

    Args:
        pictures: on the backbone's device.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        schedule: Schedule,
        store: Store,
        pictures: Pictures,
    ) -> None:
        super().__init__(config, backbone, schedule, store)
        self.pictures = pictures

    def draw(self, size: int, generator: torch.Generator) -> Drawn:
        """Pictures and starts of ``size`` rows in all N slots, so that groups change nothing."""
        x0, prompts = self.pictures.draw(generator, size)
        fine = one_in_each_slot(self.grid, size, generator)
        noise = torch.randn(self.grid.slots, *x0.shape, generator=generator).to(x0.device)
        return Drawn(x0, prompts, fine, noise)

    def starts(self, slots: Sequence[int], drawn: Drawn) -> Start:
        """The rows of some slots."""
        steps, fine = torch.tensor(self.grid.fine), drawn.fine[list(slots)].flatten()
        t, after = steps[fine], steps[fine + 1]
        x0 = drawn.x0.repeat(len(slots), 1, 1, 1)
        z = with_noise(self.schedule, x0, t, drawn.noise[list(slots)].flatten(0, 1))
        return Start(z, t, after, repeat(drawn.prompts, len(slots)))


def one_in_each_slot(grid: Grid, size: int, generator: torch.Generator) -> Tensor:
    """A fine step inside each slot n = 0 ... N - 1 for each of ``size`` rows, int [N, B]."""
    inside = torch.randint(grid.fine_steps, (grid.slots, size), generator=generator)
    heads = (grid.slots - 1 - torch.arange(grid.slots)) * grid.fine_steps
    return heads[:, None] + inside


def with_noise(schedule: Schedule, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
    """z_t of clean latents, all [B, C, H, W]."""
    return schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * noise

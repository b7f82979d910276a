"""The neighbours, restated in the form of their papers and published code: what this library is
measured against.

Every method trains the same LoRA on the same network. Its iteration is at N positions, one in each
slot, as an iteration of RAPM is; where its paper takes pictures, it gets rendered scenes in the
VAE's latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rapm.config import Config
from rapm.network import Backbone
from rapm.objective import Conditioning, repeat
from rapm.schedule import Grid, Schedule
from rapm.trajectories import TrajectoryStore
from rapm.turns import Learner


@dataclass(frozen=True)
class Pictures:
    """Clean latents of real pictures, [n, C, H, W], and the conditioning of their captions, [n,
    ...]."""

    latents: Tensor
    conditioning: Conditioning

    def draw(self, generator: torch.Generator, times: int) -> tuple[Tensor, Conditioning]:
        """One picture, ``times`` over."""
        k = int(torch.randint(len(self.latents), (1,), generator=generator))
        own = {name: value[k : k + 1] for name, value in self.conditioning.items()}
        return self.latents[k : k + 1].expand(times, -1, -1, -1), repeat(own, times)


@dataclass(frozen=True)
class World:
    """What a method is given.

    Attributes:
        student: with the role ``STUDENT``.
        grid: N slots of M solver steps each.
        unconditional: what guidance leads away from.
        store: the teacher's trajectories, for methods that take them.
    """

    config: Config
    student: Backbone
    schedule: Schedule
    grid: Grid
    unconditional: Conditioning
    pictures: Pictures
    store: TrajectoryStore


class Method(Protocol):
    """A method of distillation.

    Attributes:
        turns: iterations for each update of the student.
        stochastic: its student is sampled by predicting the clean latent and noising it again, not
            by DDIM.
    """

    turns: int
    stochastic: bool

    def iterate(
        self, iteration: int, generator: torch.Generator
    ) -> tuple[dict[str, float], list[Learner]]:
        """Accumulates an iteration's gradients; returns losses and whose turn it was."""
        ...


def one_in_each_slot(grid: Grid, generator: torch.Generator) -> list[int]:
    """A fine step to start at in each slot, from high noise to low."""
    inside = torch.randint(grid.fine_steps, (grid.slots,), generator=generator)
    return [slot * grid.fine_steps + int(k) for slot, k in enumerate(inside)]

"""Plain regression on stored positions: from z~_{n+1} to z~_n, in one step of the student's."""

from __future__ import annotations

from typing import ClassVar

import torch

from baselines import Baseline
from rapm.methods.base import Batch, Losses


class Regression(Baseline):
    """Every slot of the stored trajectories, each from the teacher's own position."""

    stores_positions: ClassVar[bool] = True

    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        losses = Losses(self.grid.slots, len(batch.noise))
        for slots in self.slot_groups():
            start, end = (torch.cat([batch.absolute[:, n + k] for n in slots]) for k in (1, 0))
            distance = self.distance(self.student_step(slots, start, batch.conditioning), end)
            self.student.backward([distance], [torch.full_like(distance, losses.share)])
            losses.add("distance", distance)
        return dict(losses)

"""Latent consistency models (LCM, arXiv 2310.04378), as LCM-LoRA's script (2311.05556) trains them.

The student's predictions of the clean latent, before and after one guided teacher step, shall be
the same.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from baselines import OfPictures, Pictures
from rapm.config import Config
from rapm.methods.base import Batch, Losses, Store
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.sampling import Conditioning, guided
from rapm.schedule import Schedule

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5


def boundary(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timestep t (the end counts as 0), broadcastable over ``like``."""
    scaled = (t.clamp(min=0) * TIMESTEP_SCALING).to(like).reshape(-1, *[1] * (like.ndim - 1))
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


class Lcm(OfPictures):
    """LCM's step."""

    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        schedule: Schedule,
        store: Store,
        pictures: Pictures,
    ) -> None:
        super().__init__(config, backbone, schedule, store, pictures)
        scale = config.trajectories.guidance_scale
        self.teacher = guided(backbone, store.unconditional, scale)

    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        size = len(batch.noise)
        drawn, losses = self.draw(size, generator), Losses(self.grid.slots, size)
        for slots in self.slot_groups():
            z, t, after, prompts = self.starts(slots, drawn)
            with torch.no_grad(), self.backbone.adapter(TEACHER):
                moved = self.schedule.step(z, self.teacher(z, t, prompts), t, after)
            with self.backbone.adapter(STUDENT):
                with torch.no_grad():
                    target = self.clean(moved, after, prompts)
                distance = self.distance(self.clean(z, t, prompts), target)
            self.student.backward([distance], [torch.full_like(distance, losses.share)])
            losses.add("distance", distance)
        return dict(losses)

    def clean(self, z: Tensor, t: Tensor, prompts: Conditioning) -> Tensor:
        """The student's prediction of the clean latent; at the end it is z itself."""
        asked, (skip, out) = t.clamp(min=0), boundary(t, z)
        x0, _ = self.schedule.x0_and_eps(z, self.backbone(z, asked, prompts), asked)
        return skip * z + out * x0

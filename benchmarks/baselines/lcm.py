"""Latent consistency models (LCM, arXiv 2310.04378), as the LoRA script of LCM-LoRA (arXiv
2311.05556) trains them.

The student's predictions of the clean latent from before and after one guided teacher step shall be
the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines import World, one_in_each_slot
from rapm.network import STUDENT, TEACHER
from rapm.objective import pseudo_huber
from rapm.trajectories import guided
from rapm.turns import Learner

TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5


def boundary(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timestep t (the end counts as 0), broadcastable over ``like``."""
    scaled = (t.clamp(min=0) * TIMESTEP_SCALING).to(like).reshape(-1, *[1] * (like.ndim - 1))
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


@dataclass(frozen=True)
class Lcm:
    """LCM's step."""

    world: World
    learner: Learner
    turns: int = 1
    stochastic: bool = True

    def iterate(
        self, iteration: int, generator: torch.Generator
    ) -> tuple[dict[str, float], list[Learner]]:
        world = self.world
        schedule, grid, fine = world.schedule, world.grid, world.grid.fine
        x0, conditioning = world.pictures.draw(generator, grid.slots)
        starts = one_in_each_slot(grid, generator)
        t, after = (
            torch.tensor([fine[k] for k in starts]),
            torch.tensor([fine[k + 1] for k in starts]),
        )
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        z = schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * noise

        def clean(z: Tensor, t: Tensor) -> Tensor:
            asked = t.clamp(min=0)
            skip, out = boundary(t, z)
            return (
                skip * z
                + out * schedule.x0_and_eps(z, world.student(z, asked, conditioning), asked)[0]
            )

        with torch.no_grad(), world.student.role(TEACHER):
            teacher = guided(
                world.student, world.unconditional, world.config.trajectories.guidance_scale
            )
            moved = schedule.step(z, teacher(z, t, conditioning), t, after)
        with world.student.role(STUDENT):
            with torch.no_grad():
                target = clean(moved, after)
            loss = pseudo_huber(clean(z, t), target).mean()
            loss.backward()
        return {"distance": float(loss.detach())}, [self.learner]

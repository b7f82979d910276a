"""Plain regression on stored trajectories: from the teacher's position at the head of a slot to its
position at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baselines import World
from rapm.network import STUDENT
from rapm.objective import pseudo_huber, repeat, student_step
from rapm.train import draw_batch
from rapm.turns import Learner


@dataclass(frozen=True)
class Regression:
    """One trajectory, all its slots."""

    world: World
    learner: Learner
    turns: int = 1
    stochastic: bool = False

    def iterate(
        self, iteration: int, generator: torch.Generator
    ) -> tuple[dict[str, float], list[Learner]]:
        world = self.world
        batch = draw_batch(
            world.store, 1, world.config.training.seed, iteration, world.student.device
        )
        slots = list(range(world.grid.slots))[::-1]
        conditioning = repeat(batch.conditioning, len(slots))
        start, end = (torch.cat([batch.coarse[:, n + k] for n in slots]) for k in (1, 0))
        with world.student.role(STUDENT):
            moved = student_step(
                world.student, world.schedule, world.grid, slots, start, conditioning
            )
            loss = pseudo_huber(moved, end).mean()
            loss.backward()
        return {"distance": float(loss.detach())}, [self.learner]

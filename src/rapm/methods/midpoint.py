"""Midpoint: the student as an implicit midpoint step of the teacher's ODE. This is ours, not RAPM.

    z_N ~ N(0, I)
    for n = N-1 ... 0:
        eps     = student(z_{n+1}, t_{n+1})                                one pass for both lines
        z_n^phi = step(z_{n+1}, eps, t_{n+1} -> t_n)                     gradient flows here only
        z_mid   = detach(step(z_{n+1}, eps, t_{n+1} -> t_mid))
        z~_n    = step(z_mid, guided teacher(z_mid, t_mid), t_mid -> t_n)
        L_n     = w_n d(z_n^phi, z~_n)
        z_n     = detach(z_n^phi)
    every iteration updates the student on L = sum of L_n
    sample: N DDIM steps, trailing, guidance 1

The student's own step leads half-way down the slot, where the guided teacher takes over, and the
student is asked to be where the teacher gets. Both steps agree where the student's prediction at
z_{n+1} is the teacher's at z_mid: an implicit midpoint step, learnt instead of iterated. Where a
path leads is decided on the way, by guidance, call by call; so the student is asked only that the
teacher, met on the student's own way, would not turn off.

It needs no rollout, no stored positions and no discriminator, and one guided teacher pass a slot.
In two small worlds it is ahead of what else was tried, in captions and FID, on every seed
(docs/results.md). It has not been run on published weights.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from rapm.config import Config
from rapm.methods.base import Batch, Losses, Method, Store
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.sampling import ddim, guided, repeat
from rapm.schedule import Schedule


class Midpoint(Method):
    """Ours: ``Midpoint(config, backbone, schedule, store)``, see :class:`Method`."""

    stores_positions: ClassVar[bool] = False

    def __init__(
        self, config: Config, backbone: Backbone, schedule: Schedule, store: Store
    ) -> None:
        super().__init__(config, backbone, schedule, store)
        self.weights = config.slot_weights(config.midpoint.weight)
        scale = config.trajectories.guidance_scale
        self.teacher = guided(backbone, store.unconditional, scale)

    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """One iteration on one batch of noise and prompts; see :meth:`Method.training_step`."""
        grid, schedule, size = self.grid, self.schedule, len(batch.noise)
        losses = Losses(grid.slots, size)
        z = batch.noise
        for slots in self.slot_groups():
            start = self.student_starts(slots, z, batch.conditioning)
            prompts = repeat(batch.conditioning, len(slots))
            t, mid, end = (
                self.rows([place(n) for n in slots], size)
                for place in (lambda n: grid.coarse(n + 1), grid.intermediate, grid.coarse)
            )
            with self.backbone.adapter(STUDENT):
                step = next(ddim(self.backbone, schedule, start, [t, end], prompts))
            with self.backbone.adapter(TEACHER), torch.no_grad():
                z_mid = schedule.step(start, step.prediction, t, mid)
                z_tilde = next(ddim(self.teacher, schedule, z_mid, [mid, end], prompts)).end
            phi = step.end.detach().requires_grad_()
            distance = self.distance(phi, z_tilde)
            (pull,) = torch.autograd.grad(distance.sum(), phi)
            self.student.backward([step.end], [self.by_slot(self.weights, slots, size) * pull])
            losses.add("distance", distance, slots)
            z = step.end.detach()[-size:]
        return dict(losses)

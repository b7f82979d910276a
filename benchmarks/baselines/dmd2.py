"""Distribution matching, in the several-step form of DMD2 (arXiv 2405.14867), without its
discriminator on real pictures.

The student's clean latents, met at all its N steps from its own samples, are moved to where the
teacher finds them likelier than a second diffusion network does, a LoRA that keeps learning what
the student makes (five turns for each of the student's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines import World
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import Conditioning, repeat
from rapm.trajectories import guided
from rapm.turns import Learner

FAKE = "fake"
LOWEST, HIGHEST = 20, 980  # timesteps that scores are compared at, both included


@dataclass(frozen=True)
class Dmd2:
    """DMD2's step. ``critic`` is the network with the role ``FAKE``; of six turns one is the
    student's."""

    world: World
    critic: Backbone
    learner: Learner
    fake: Learner
    turns: int = 6
    stochastic: bool = True

    def samples(self, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Clean latents of the student's N steps, from its own positions, which carry no gradient.
        Called inside its role."""
        world, row = self.world, {name: value[:1] for name, value in conditioning.items()}
        shape = (1, *world.pictures.latents.shape[1:])
        steps, z = [], torch.randn(shape, generator=generator).to(world.pictures.latents)
        for n in reversed(range(world.grid.slots)):
            t = torch.tensor([world.grid.coarse(n + 1)])
            steps.append(world.schedule.x0_and_eps(z, world.student(z, t, row), t)[0])
            lower = max(world.grid.coarse(n), 0)
            noise = torch.randn(shape, generator=generator).to(z)
            z = (
                world.schedule.alpha(lower, z) * steps[-1].detach()
                + world.schedule.sigma(lower, z) * noise
            )
        return torch.cat(steps)

    def iterate(
        self, iteration: int, generator: torch.Generator
    ) -> tuple[dict[str, float], list[Learner]]:
        world, schedule, mine = self.world, self.world.schedule, iteration % self.turns == 0
        _, one = world.pictures.draw(generator, 1)
        conditioning = repeat(one, world.grid.slots)
        low, high = (LOWEST, HIGHEST + 1) if mine else (0, schedule.num_train_timesteps)
        t = torch.randint(low, high, (world.grid.slots,), generator=generator)
        with world.student.role(STUDENT), torch.set_grad_enabled(mine):
            x0 = self.samples(conditioning, generator)
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            z = (schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * noise).detach()
            if mine:
                likelier = self._direction(x0.detach(), z, t, conditioning)
                loss = 0.5 * F.mse_loss(x0, x0.detach() - likelier)
                loss.backward()
        if mine:
            return {"matching": float(loss.detach())}, [self.learner]
        with self.critic.role(FAKE):
            loss = F.mse_loss(schedule.x0_and_eps(z, self.critic(z, t, conditioning), t)[1], noise)
            loss.backward()
        return {"fake": float(loss.detach())}, [self.fake]

    @torch.no_grad()
    def _direction(self, x0: Tensor, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        world = self.world
        with self.critic.role(TEACHER):
            teacher = guided(
                self.critic, world.unconditional, world.config.trajectories.guidance_scale
            )
            real = world.schedule.x0_and_eps(z, teacher(z, t, conditioning), t)[0]
        with self.critic.role(FAKE):
            fake = world.schedule.x0_and_eps(z, self.critic(z, t, conditioning), t)[0]
        return (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)

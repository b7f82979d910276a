"""Distribution matching, DMD2's form of several steps (arXiv 2405.14867), without its GAN loss.

The student's clean latents, met at all its N steps from its own samples, are moved to where the
teacher finds them likelier than a second diffusion network does. That network is a LoRA that keeps
learning what the student makes, in five iterations for each of the student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from baselines import Baseline, with_noise
from rapm.config import Config
from rapm.methods.base import Batch, Losses, Store
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.optim import Learner
from rapm.sampling import Conditioning, guided, repeat
from rapm.schedule import Schedule

FAKE = "fake"
ITERATIONS = 6  # the student's is the first
LOWEST, HIGHEST = 20, 980  # timesteps that scores are compared at, both included


class Dmd2(Baseline):
    """DMD2's step, from the prompts of the trajectories and new noise."""

    stochastic: ClassVar[bool] = True

    def __init__(
        self, config: Config, backbone: Backbone, schedule: Schedule, store: Store
    ) -> None:
        super().__init__(config, backbone, schedule, store)
        student, training = config.student, config.training
        targets = student.targets or backbone.lora_targets
        backbone.add_adapter(FAKE, student.rank, targets, training.seed + 1)
        self.fake = Learner(
            backbone,
            FAKE,
            learning_rate=config.discriminators.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=training.weight_decay,
            optimizer=training.optimizer,
        )
        scale = config.trajectories.guidance_scale
        self.teacher = guided(backbone, store.unconditional, scale)

    @property
    def learners(self) -> Mapping[str, Learner]:
        return {STUDENT: self.student, FAKE: self.fake}

    def learning(self, iteration: int) -> tuple[str, ...]:
        return (STUDENT,) if iteration % ITERATIONS == 0 else (FAKE,)

    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        student_learns, slots = STUDENT in self.learning(iteration), self.grid.slots
        prompts, losses = repeat(batch.conditioning, slots), Losses(slots, len(batch.noise))
        every = 0, self.schedule.num_train_timesteps
        low, high = (LOWEST, HIGHEST + 1) if student_learns else every
        with torch.set_grad_enabled(student_learns), self.backbone.adapter(STUDENT):
            x0 = self.samples(batch, generator)
        t = torch.randint(low, high, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        z = with_noise(self.schedule, x0.detach(), t, noise)
        if student_learns:
            goal = x0.detach() - self.direction(x0.detach(), z, t, prompts)
            rows = 0.5 * (x0 - goal).square().flatten(1).mean(1)
            self.student.backward([rows], [torch.full_like(rows, losses.share)])
        else:
            with self.backbone.adapter(FAKE):
                eps = self.schedule.x0_and_eps(z, self.backbone(z, t, prompts), t)[1]
            rows = (eps - noise).square().flatten(1).mean(1)
            self.fake.backward([rows], [torch.full_like(rows, losses.share)])
        losses.add("matching" if student_learns else "fake", rows)
        return dict(losses)

    def samples(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Clean latents of the student's N steps from new noise, [N B, C, H, W].

        No gradient flows from step to step. In the student's adapter only.
        """
        shape, steps = batch.noise.shape, []
        z = torch.randn(shape, generator=generator).to(batch.noise)
        for n in reversed(range(self.grid.slots)):
            t = torch.full((len(z),), self.grid.coarse(n + 1))
            prediction = self.backbone(z, t, batch.conditioning)
            steps.append(self.schedule.x0_and_eps(z, prediction, t)[0])
            noise = torch.randn(shape, generator=generator).to(z)
            z = with_noise(self.schedule, steps[-1].detach(), max(self.grid.coarse(n), 0), noise)
        return torch.cat(steps)

    @torch.no_grad()
    def direction(self, x0: Tensor, z: Tensor, t: Tensor, prompts: Conditioning) -> Tensor:
        """From what the teacher sees in z to what the fake score does, by DMD's length."""
        with self.backbone.adapter(TEACHER):
            real = self.schedule.x0_and_eps(z, self.teacher(z, t, prompts), t)[0]
        with self.backbone.adapter(FAKE):
            fake = self.schedule.x0_and_eps(z, self.backbone(z, t, prompts), t)[0]
        return (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)

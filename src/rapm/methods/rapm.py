"""RAPM: relative and absolute position matching (arXiv 2503.20744).

    once:   z~_N ~ N(0, I);  z~_{N-1} ... z~_0 by M guided DDIM steps a slot; stored
    train:  z_N = z~_N
            for n = N-1 ... 0:
                z_n^phi = DDIM(student, z_{n+1}, t_{n+1} -> t_n)         gradient flows here only
                z^_n    = detach(DDIM(student, z^Delta_{n+1}, t_{n+1} - Delta -> t_n))
                L_n     = relative(z_n^phi, z^_n) + w_n absolute(z_n^phi, z~_n)
                z_n     = detach(z_n^phi)
            EVEN iterations update both discriminators, ODD ones the student, on L = sum of L_n
    sample: N DDIM steps, trailing, guidance 1

Each loss is a distance and an adversarial term, d(z_n^phi, target) + lambda A(z_n^phi), where a
discriminator takes the target for real and z_n^phi for fake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rapm.config import Config
from rapm.discriminator import Discriminator
from rapm.losses import with_length_of
from rapm.methods.base import Batch, Losses, Method, Store
from rapm.network import STUDENT, Backbone
from rapm.optim import Learner
from rapm.sampling import Conditioning, ddim, repeat
from rapm.schedule import Schedule


class Rapm(Method):
    """The paper's method: ``Rapm(config, backbone, schedule, store)``, see :class:`Method`."""

    def __init__(
        self, config: Config, backbone: Backbone, schedule: Schedule, store: Store
    ) -> None:
        super().__init__(config, backbone, schedule, store)
        self.weights = {  # of the two losses, in each slot n = 0 ... N - 1
            "relative": config.slot_weights(float(config.rapm.relative)),
            "absolute": config.slot_weights(config.rapm.absolute_weight),
        }
        own = config.discriminators
        keys = {"rank", "targets", "head_width", "loss", "noise", "learning_rate"}
        settings = own.model_dump(include=keys)
        settings |= config.training.model_dump(include={"weight_decay", "optimizer"})
        terms = [term for term, each in self.weights.items() if any(each)]
        example = Batch.of([store[0]], backbone.device)
        self.discriminators = {
            term: Discriminator.build(
                *(backbone, f"{term}_discriminator", schedule, self.grid),
                example=(example.noise, example.conditioning),
                seed=config.training.seed + 1 + place,
                **settings,
            )
            for place, term in enumerate(terms if own.adversarial_weight else ())
        }

    @property
    def learners(self) -> Mapping[str, Learner]:
        return {STUDENT: self.student} | {d.name: d.learner for d in self.discriminators.values()}

    def learning(self, iteration: int) -> tuple[str, ...]:
        student, *discriminators = self.learners
        if self.config.discriminators.schedule == "joint" or not discriminators:
            return student, *discriminators
        return tuple(discriminators) if iteration % 2 == 0 else (student,)

    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """One iteration on one batch of stored trajectories; see :meth:`Method.training_step`."""
        learning, settings = self.learning(iteration), self.config.rapm
        losses = Losses(self.grid.slots, len(batch.noise))
        for discriminator in self.discriminators.values():
            discriminator.draw_noise(batch.noise.shape, generator)
        z = batch.noise  # z_N = z~_N
        for slots in self.slot_groups(None if settings.detach_slots else self.grid.slots):
            prompts = repeat(batch.conditioning, len(slots))
            with torch.set_grad_enabled(STUDENT in learning):
                z_phi = self.student_positions(slots, z, batch)  # z_n^phi
            with torch.set_grad_enabled(STUDENT in learning and not settings.detach_relative):
                z_hat = self.relative_positions(slots, batch)  # z^_n, first detach
            z_tilde = torch.cat([batch.absolute[:, n] for n in slots])  # z~_n
            targets = {"relative": z_hat, "absolute": z_tilde}
            if STUDENT in learning:
                self.update_student(slots, z_phi, targets, prompts, losses)
            for term, discriminator in self.discriminators.items():
                if discriminator.name in learning:
                    loss, margin = discriminator.learn(slots, targets[term], z_phi, prompts)
                    losses.add(f"{term}_discriminator", loss)
                    losses.add(f"{term}_margin", margin)
            z = z_phi.detach()[-len(z) :]  # z_n, second detach
        return dict(losses)

    def update_student(
        self,
        slots: Sequence[int],
        z_phi: Tensor,
        targets: Mapping[str, Tensor],
        prompts: Conditioning,
        losses: Losses,
    ) -> None:
        """Accumulates the student's gradient of L_n = relative + w_n absolute, of some slots.

        In two stages: the gradient at z_n^phi first, each discriminator's share in its own adapter;
        then through the student's graph.
        """
        settings, z_hat = self.config.discriminators, targets["relative"]
        at_phi, at_hat = torch.zeros_like(z_phi), torch.zeros_like(z_hat)
        for term, target in targets.items():
            w = self.by_slot(self.weights[term], slots, len(z_phi) // len(slots))
            if not any(self.weights[term][n] for n in slots):
                continue
            phi, goal = z_phi.detach().requires_grad_(), target.detach().requires_grad_()
            distance = self.distance(phi, goal)  # d(z_n^phi, target)
            pull, at_goal = torch.autograd.grad(distance.sum(), (phi, goal))
            losses.add(f"{term}_distance", distance, slots)
            if term in self.discriminators:  # + lambda A(z_n^phi)
                discriminator = self.discriminators[term]
                adversarial, push = discriminator.student_gradient(slots, goal, phi, prompts)
                push = with_length_of(push, pull) if settings.weighting == "adaptive" else push
                pull = pull + settings.adversarial_weight * push
                losses.add(f"{term}_adversarial", adversarial)
            at_phi += w * pull
            at_hat += w * at_goal if term == "relative" else 0
        ends = [(z_phi, at_phi), (z_hat, at_hat)][: 1 + z_hat.requires_grad]
        self.student.backward(*zip(*ends, strict=True))

    def student_positions(self, slots: Sequence[int], z: Tensor, batch: Batch) -> Tensor:
        """z_n^phi = DDIM(student, z_{n+1}, t_{n+1} -> t_n), [k B, C, H, W]."""
        prompts = batch.conditioning
        if self.config.rapm.detach_slots and torch.is_grad_enabled():
            return self.student_step(slots, self.student_starts(slots, z, prompts), prompts)
        timesteps = [self.grid.coarse(n) for n in (slots[0] + 1, *slots)]
        with self.backbone.adapter(STUDENT):
            walk = ddim(self.backbone, self.schedule, z, timesteps, prompts)
            return torch.cat([step.end for step in walk])

    def relative_positions(self, slots: Sequence[int], batch: Batch) -> Tensor:
        """z^_n = DDIM(student, z^Delta_{n+1}, t_{n+1} - Delta -> t_n), [k B, C, H, W]."""
        z = torch.cat([batch.intermediate[:, n] for n in slots])
        if not any(self.weights["relative"]) or self.grid.delta == self.grid.fine_steps:
            return z  # nobody asks; or it is at t_n already
        start = [self.grid.intermediate(n) for n in slots]
        return self.student_step(slots, z, batch.conditioning, start)

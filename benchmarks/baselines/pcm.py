"""Phased consistency models (PCM, arXiv 2405.18407), as its authors' script for LoRAs trains them.

Two networks are in memory: the student, a LoRA, which without gradients is its own target too; and
    the teacher, which is also
what the discriminator's heads read. Each step noises a clean latent, takes one guided teacher step
from there, and asks that the student's predictions from before and after that step end in the same
place at the edge of the phase (here: slot).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines import Pictures, one_in_each_slot
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import Conditioning, hinge_critic, hinge_student, pseudo_huber
from rapm.schedule import Grid, Schedule
from rapm.trajectories import guided
from rapm.turns import Learner

ADVERSARIAL_WEIGHT = 0.1


class Head(nn.Module):
    """[conv, GroupNorm(32), LeakyReLU] twice, the second with a residual, in the map's own width;
    then one channel."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(channels, channels, kernel, padding=kernel // 2),
                nn.GroupNorm(math.gcd(32, channels), channels),
                nn.LeakyReLU(inplace=True),
            )
            for _ in range(2)
        )
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map [B, C, h, w] to logits [B, 1, h, w]."""
        x = self.first(x)
        return self.out(self.second(x) + x)


@dataclass(frozen=True)
class Form:
    """What differs between the published discriminators: which blocks are read, by how many heads
    each, with which kernel."""

    up_blocks: bool
    heads: int
    kernel: int


FORMS = {
    "sd15": Form(up_blocks=True, heads=4, kernel=3),
    "sdxl": Form(up_blocks=False, heads=1, kernel=1),
}


def taps(network: nn.Module, form: Form) -> list[str]:
    """The blocks a discriminator reads."""
    kinds = ("down_blocks", "up_blocks") if form.up_blocks else ("down_blocks",)
    named = {
        kind: [f"{kind}.{k}" for k in range(len(network.get_submodule(kind)))] for kind in kinds
    }  # type: ignore[arg-type]
    return [*named["down_blocks"], "mid_block", *named.get("up_blocks", [])]


class Heads(nn.Module):
    """All heads over all maps."""

    def __init__(self, channels: Sequence[int], form: Form, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.of_maps = nn.ModuleList(
                nn.ModuleList(Head(c, form.kernel) for _ in range(form.heads)) for c in channels
            )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [head(x) for heads, x in zip(self.of_maps, features, strict=True) for head in heads]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Pcm:
    """PCM's step.

    Attributes:
        student: with the role ``STUDENT``.
        teacher: another network of the same weights, tapped as :func:`taps` says.
        learner, critic: of the student's LoRA and of the heads.
        unconditional: what guidance leads away from.
        guidance_scale: 1 + w in the paper's convention.
        pictures: for :meth:`iterate`.
    """

    student: Backbone
    teacher: Backbone
    schedule: Schedule
    grid: Grid
    learner: Learner
    critic: Learner
    unconditional: Conditioning
    guidance_scale: float
    pictures: Pictures | None = None
    turns: int = 2
    stochastic: bool = False

    def iterate(
        self, iteration: int, generator: torch.Generator
    ) -> tuple[dict[str, float], list[Learner]]:
        assert self.pictures is not None
        x0, conditioning = self.pictures.draw(generator, self.grid.slots)
        critic = iteration % self.turns == 0
        losses = self.turn(
            x0,
            one_in_each_slot(self.grid, generator),
            conditioning,
            generator,
            critic=critic,
            share=1.0,
        )
        return losses, [self.critic if critic else self.learner]

    def turn(
        self,
        x0: Tensor,
        starts: Sequence[int],
        conditioning: Conditioning,
        generator: torch.Generator,
        *,
        critic: bool,
        share: float,
    ) -> dict[str, float]:
        """Accumulates the gradient of one turn: the discriminator's, or the student's.

        Args:
            x0: clean latents of real pictures, [B, C, H, W].
            starts: for each row the fine step k (0 ... N M - 1, 0 is pure noise) it starts at.
            share: what the mean over these rows is multiplied with.
        """
        schedule, grid, fine = self.schedule, self.grid, self.grid.fine
        device, on = x0.device, self.student.device.type
        slots = [grid.slots - 1 - k // grid.fine_steps for k in starts]
        t, after, edge, top = (
            torch.tensor(values)
            for values in ([fine[k] for k in starts], [fine[k + 1] for k in starts],
                           [grid.coarse(n) for n in slots], [grid.coarse(n + 1) for n in slots])
        )  # fmt: skip
        noise, fake_noise, real_noise = (
            torch.randn(x0.shape, generator=generator).to(device) for _ in range(3)
        )
        z = schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * noise
        low = edge.clamp(min=0)
        tau = (
            low
            + (
                (top - low) * torch.rand(len(starts), generator=generator, dtype=torch.float64)
            ).long()
        )
        with ExitStack() as roles:
            roles.enter_context(self.student.role(STUDENT))
            roles.enter_context(self.teacher.role(TEACHER))
            ours = schedule.step(z, self.student(z, t, conditioning), t, edge)
            with torch.no_grad():
                teacher = guided(self.teacher, self.unconditional, self.guidance_scale)
                moved = schedule.step(z, teacher(z, t, conditioning), t, after)
                # Where the teacher's step ends on the edge the end is known, and nothing is asked
                # (its boundary condition).
                asked = after.clamp(min=0)
                target = schedule.step(moved, self.student(moved, asked, conditioning), asked, edge)
                target = torch.where((after == edge)[:, None, None, None].to(device), moved, target)
            assert self.critic.heads is not None

            def logits(position: Tensor, own_noise: Tensor) -> list[Tensor]:
                shown = schedule.renoise(position, edge, tau, own_noise)
                features = self.teacher.features(shown, tau, conditioning)
                if (
                    self.teacher.dtype == torch.float32 or on == "meta"
                ):  # where bytes are counted, which has no autocast
                    return self.critic.heads([x.float() for x in features])  # type: ignore[misc]
                with torch.autocast(on, self.teacher.dtype):
                    return [x.float() for x in self.critic.heads(features)]  # type: ignore[misc]

            if critic:
                loss = hinge_critic(
                    logits(target, real_noise), logits(ours.detach(), fake_noise)
                ).mean()
                (share * loss).backward()
                return {"critic": float(loss.detach())}
            distance = pseudo_huber(ours, target).mean()
            adversarial = hinge_student(logits(ours, fake_noise)).mean()
            (share * (distance + ADVERSARIAL_WEIGHT * adversarial)).backward(
                inputs=list(self.learner.parameters.values())
            )
            return {
                "distance": float(distance.detach()),
                "adversarial": float(adversarial.detach()),
            }

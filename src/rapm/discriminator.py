"""A discriminator: the frozen network with a LoRA, and small heads over its features.

It sees positions with noise added up to a random timestep of their slot, and knows that timestep
and the prompt, as PCM's does (arXiv 2405.18407). It reads maps; a real or a fake position is judged
in every place of every map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rapm import losses
from rapm.network import TEACHER, Backbone
from rapm.optim import Learner, OptimizerName
from rapm.sampling import Conditioning, repeat
from rapm.schedule import Grid, Schedule

Loss = Literal["hinge", "relativistic"]
Noise = Literal["independent", "shared"]


class Head(nn.Module):
    """[conv 1x1, GroupNorm(32), LeakyReLU] twice with a residual, then one channel: PCM's for SDXL.

    A projection to ``width`` comes first, so that a head costs the same whatever the network's
    width. PCM's own for SD 1.5 have 664 million parameters.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(width, width, 1),
                nn.GroupNorm(math.gcd(32, width // 2), width),
                nn.LeakyReLU(),
            )
            for _ in range(2)
        )
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map [B, C, h, w] to logits [B, 1, h, w]."""
        x = self.first(self.project(x))
        return self.out(self.second(x) + x)


class Heads(nn.Module):
    """One head for each feature map, float32.

    Args:
        channels: of each feature map.
        width: of each head.
        seed: of the first weights.
    """

    def __init__(self, channels: Sequence[int], width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList([Head(c, width) for c in channels])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps [B, C, h, w] to logits [B, 1, h, w] each."""
        return [head(x) for head, x in zip(self.heads, features, strict=True)]


@dataclass(frozen=True)
class AddedNoise:
    """What is added to the positions of each slot (first axis n = 0 ... N - 1).

    Attributes:
        timesteps: int [N, B], uniform in [t_n, t_{n+1}); the end counts as timestep 0.
        real, fake: noise, [N, B, C, H, W]; the same where it is shared.
    """

    timesteps: Tensor
    real: Tensor
    fake: Tensor

    @classmethod
    def draw(
        cls, grid: Grid, shape: Sequence[int], generator: torch.Generator, *, shared: bool = False
    ) -> AddedNoise:
        """Draws for all N slots at once, row by row: neither slot groups nor the batch change it.

        Args:
            shape: (B, C, H, W).
            generator: on the CPU.
        """
        low = torch.tensor([max(grid.coarse(n), 0) for n in range(grid.slots)])
        high = torch.tensor([grid.coarse(n + 1) for n in range(grid.slots)])
        timesteps, noise = [], []
        for _ in range(shape[0]):
            u = torch.rand(grid.slots, generator=generator, dtype=torch.float64)
            timesteps.append((low + (high - low) * u).long())
            noise.append(torch.randn(2, grid.slots, *shape[1:], generator=generator))
        real, fake = torch.stack(noise, 2)
        return cls(torch.stack(timesteps, 1), real, real if shared else fake)

    def of(self, slots: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps [k B], noise of real and of fake [k B, C, H, W], of k slots."""
        index = list(slots)
        every = (self.timesteps, self.real, self.fake)
        timesteps, real, fake = (x[index].flatten(0, 1) for x in every)
        return timesteps, real, fake


class Discriminator:
    """D_rel or D_abs: tells a target (real) from the student's own position (fake) at t_n.

    All positions are [k B, C, H, W], those of k slots after one another.

    Args:
        learner: its adapter and heads.
        loss: hinge, or relativistic (which of the two is the teacher's).
        noise: real and fake are seen each under its own noise, or under the same.
    """

    added: AddedNoise

    def __init__(
        self, learner: Learner, schedule: Schedule, grid: Grid, loss: Loss, noise: Noise
    ) -> None:
        assert learner.heads is not None
        self.learner, self.backbone, self.heads = learner, learner.backbone, learner.heads
        self.name, self.schedule, self.grid = learner.adapter, schedule, grid
        self.loss, self.noise = loss, noise

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> None:
        """Draws what the positions of one iteration, (B, C, H, W) in each slot, are seen under."""
        shared = self.noise == "shared"
        self.added = AddedNoise.draw(self.grid, shape, generator, shared=shared)

    @classmethod
    def build(
        cls,
        backbone: Backbone,
        adapter: str,
        schedule: Schedule,
        grid: Grid,
        *,
        example: tuple[Tensor, Conditioning],
        rank: int,
        targets: Sequence[str],
        head_width: int,
        loss: Loss,
        noise: Noise,
        seed: int,
        learning_rate: float,
        weight_decay: float,
        optimizer: OptimizerName,
    ) -> Discriminator:
        """Adds the adapter, in the layers that features are computed by, and its heads.

        Args:
            example: a position [1, C, H, W] and its prompt, to see the features' widths by.
            targets: names or endings of names of the layers that get LoRA; [] the backbone's.
        """
        z, conditioning = example
        inputs = z, torch.zeros(1, dtype=torch.long), conditioning
        with backbone.adapter(TEACHER), torch.no_grad():
            maps, layers = backbone.features(*inputs), backbone.layers_to_features(*inputs)
        endings = tuple(f".{target}" for target in targets or backbone.lora_targets)
        own = [name for name in layers if name.endswith(endings)]
        backbone.add_adapter(adapter, rank, own, seed)
        heads = Heads([x.shape[1] for x in maps], head_width, seed + 10).to(backbone.device)
        learner = Learner(
            backbone,
            adapter,
            heads,
            learning_rate=learning_rate,
            betas=(0.0, 0.999),
            weight_decay=weight_decay,
            optimizer=optimizer,
        )
        return cls(learner, schedule, grid, loss, noise)

    def logits(
        self, slots: Sequence[int], z: Tensor, t: Tensor, noise: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        """Each head's map for positions at t_n, with noise added up to t. In its adapter only."""
        at = torch.tensor([self.grid.coarse(n) for n in slots])
        at = at.repeat_interleave(len(z) // len(slots))
        noisy = self.schedule.add_noise(z, at, t, noise.to(z))
        return self.heads(self.backbone.features(noisy, t, conditioning))

    def student_gradient(
        self,
        slots: Sequence[int],
        real: Tensor,
        fake: Tensor,
        conditioning: Conditioning,
    ) -> tuple[Tensor, Tensor]:
        """The student's adversarial loss, [k B], and its gradient at ``fake``. D learns nothing."""
        t, real_noise, fake_noise = self.added.of(slots)
        fake = fake.detach().requires_grad_()
        with self.backbone.adapter(self.learner.adapter):
            of_fake = self.logits(slots, fake, t, fake_noise, conditioning)
            if self.loss == "hinge":
                loss = losses.hinge_student(of_fake)
            else:
                with torch.no_grad():
                    of_real = self.logits(slots, real, t, real_noise, conditioning)
                loss = losses.relativistic(of_fake, of_real)
            scale = self.backbone.loss_scale
            (gradient,) = torch.autograd.grad(scale * loss.sum(), fake)
        return loss.detach(), gradient / scale

    def learn(
        self,
        slots: Sequence[int],
        real: Tensor,
        fake: Tensor,
        conditioning: Conditioning,
    ) -> tuple[Tensor, Tensor]:
        """Accumulates the gradient of its loss: sum over slots, mean over the batch.

        Returns:
            Loss and margin, [k B] each.
        """
        t, real_noise, fake_noise = self.added.of(slots)
        with self.backbone.adapter(self.learner.adapter):
            both = self.logits(
                [*slots, *slots],
                torch.cat([real, fake]).detach(),
                torch.cat([t, t]),
                torch.cat([real_noise, fake_noise]),
                repeat(conditioning, 2),
            )
            of_real, of_fake = zip(*(x.chunk(2) for x in both), strict=True)
            form = losses.hinge_discriminator if self.loss == "hinge" else losses.relativistic
            loss = form(of_real, of_fake)
            share = len(slots) / len(loss)  # one over the batch's size
            (self.backbone.loss_scale * share * loss.sum()).backward()
        return loss.detach(), losses.margin(of_real, of_fake).detach()

"""Phased consistency models (PCM, arXiv 2405.18407), as its authors' script for LoRAs trains them.

Two networks are in memory: the student, and the teacher. The student is a LoRA, and without
gradients its own target. The teacher is also what the discriminator's heads read. A clean latent
gets noise, the guided teacher takes one step from there, and the student's predictions from before
and after that step shall end in the same place at the edge of the phase (here: the slot).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines import OfPictures, Pictures, Start
from rapm.config import Config
from rapm.losses import hinge_discriminator, hinge_student
from rapm.methods.base import Batch, Losses, Store
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.optim import Learner
from rapm.sampling import Conditioning, guided
from rapm.schedule import Schedule

ADVERSARIAL_WEIGHT = 0.1
DISCRIMINATOR = "discriminator"


class Head(nn.Module):
    """[conv, GroupNorm(32), LeakyReLU] twice with a residual, in the map's width; one channel."""

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
    """What differs between the published discriminators.

    Attributes:
        up_blocks: whether up blocks are read, beside down blocks and the middle block.
        heads: for each block.
        kernel: of their convolutions.
    """

    up_blocks: bool
    heads: int
    kernel: int


FORMS = {
    "sd15": Form(up_blocks=True, heads=4, kernel=3),
    "sdxl": Form(up_blocks=False, heads=1, kernel=1),
}


def feature_layers(network: nn.Module, form: Form) -> list[str]:
    """The blocks that a discriminator reads."""

    def blocks(kind: str) -> list[str]:
        return [f"{kind}.{k}" for k, _ in enumerate(network.get_submodule(kind).children())]

    up = blocks("up_blocks") if form.up_blocks else []
    return [*blocks("down_blocks"), "mid_block", *up]


class Heads(nn.Module):
    """All heads over all maps.

    Args:
        channels: of each feature map.
        seed: of the first weights.
    """

    def __init__(self, channels: Sequence[int], form: Form, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.of_maps = nn.ModuleList(
                nn.ModuleList(Head(c, form.kernel) for _ in range(form.heads)) for c in channels
            )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = zip(self.of_maps, features, strict=True)
        return [head(x) for heads, x in maps for head in heads]


def second_network(teacher: Teacher, config: Config, form: Form, device: str) -> Backbone:
    """The teacher once more, with the discriminator's feature layers."""
    network = teacher.load_network(config.torch_dtype, device)
    return Backbone(
        network,
        teacher.family.call,
        (),
        feature_layers(network, form),
        gradient_checkpointing=config.training.gradient_checkpointing,
    )


class Pcm(OfPictures):
    """PCM's step: even iterations update the discriminator, odd ones the student.

    Args:
        second: another network of the same weights, see :func:`second_network`.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        schedule: Schedule,
        store: Store,
        pictures: Pictures,
        second: Backbone,
        form: Form,
    ) -> None:
        super().__init__(config, backbone, schedule, store, pictures)
        self.second = second
        scale = config.trajectories.guidance_scale
        self.teacher = guided(second, store.unconditional, scale)
        x0, prompts = pictures.draw(torch.Generator(), 1)
        with torch.no_grad(), second.adapter(TEACHER):
            maps = second.features(x0, torch.zeros(1, dtype=torch.long), prompts)
        with backbone.device:
            heads = Heads([x.shape[1] for x in maps], form, config.training.seed)
        # It has no adapter. The first network's loss scale is for both.
        self.discriminator = Learner(
            backbone,
            DISCRIMINATOR,
            heads,
            learning_rate=config.discriminators.learning_rate,
            betas=(0.0, 0.999),
            weight_decay=config.training.weight_decay,
            optimizer=config.training.optimizer,
        )
        self.heads = heads

    @property
    def learners(self) -> Mapping[str, Learner]:
        return {STUDENT: self.student, DISCRIMINATOR: self.discriminator}

    def learning(self, iteration: int) -> tuple[str, ...]:
        return (DISCRIMINATOR,) if iteration % 2 == 0 else (STUDENT,)

    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        (name,), size = self.learning(iteration), len(batch.noise)
        drawn, losses = self.draw(size, generator), Losses(self.grid.slots, size)
        of_real, of_fake = (
            torch.randn(drawn.noise.shape, generator=generator).to(drawn.noise) for _ in range(2)
        )
        u = torch.rand(self.grid.slots, size, generator=generator, dtype=torch.float64)
        inputs = list(self.learners[name].parameters.values())
        for slots in self.slot_groups():
            at = self.starts(slots, drawn)
            edge, top = (self.rows([self.grid.coarse(n + k) for n in slots], size) for k in (0, 1))
            low, index = edge.clamp(min=0), list(slots)
            tau = low + ((top - low) * u[index].flatten()).long()
            real_noise, fake_noise = (x[index].flatten(0, 1) for x in (of_real, of_fake))
            seen = edge, tau, at.prompts
            with self.backbone.adapter(STUDENT), self.second.adapter(TEACHER):
                # As published: with its graph in either kind of iteration.
                phi = self.student_end(at.z, at.t, edge, at.prompts)
                with torch.no_grad():
                    target = self.target(at, edge)
                if name == STUDENT:
                    distance = self.distance(phi, target)
                    adversarial = hinge_student(self.logits(phi, fake_noise, *seen))
                    loss = distance + ADVERSARIAL_WEIGHT * adversarial
                    losses.add("distance", distance)
                    losses.add("adversarial", adversarial)
                else:
                    real = self.logits(target, real_noise, *seen)
                    loss = hinge_discriminator(real, self.logits(phi.detach(), fake_noise, *seen))
                    losses.add("discriminator", loss)
                (self.backbone.loss_scale * losses.share * loss.sum()).backward(inputs=inputs)
        return dict(losses)

    def student_end(self, z: Tensor, t: Tensor, edge: Tensor, prompts: Conditioning) -> Tensor:
        """The student's single step from z to the edge of its phase."""
        return self.schedule.step(z, self.backbone(z, t, prompts), t, edge)

    def target(self, at: Start, edge: Tensor) -> Tensor:
        """Where the student's step leads after one guided step of the teacher's.

        Where that step ends on the edge the end is known, and nothing is asked.
        """
        prediction = self.teacher(at.z, at.t, at.prompts)
        moved = self.schedule.step(at.z, prediction, at.t, at.after)
        end = self.student_end(moved, at.after.clamp(min=0), edge, at.prompts)
        on_edge = (at.after == edge)[:, None, None, None].to(moved.device)
        return torch.where(on_edge, moved, end)

    def logits(
        self, z: Tensor, noise: Tensor, edge: Tensor, tau: Tensor, prompts: Conditioning
    ) -> list[Tensor]:
        """Each head's map for positions at the edge, with noise added up to tau."""
        noisy = self.schedule.add_noise(z, edge, tau, noise)
        maps, dtype = self.second.features(noisy, tau, prompts), self.second.dtype
        device = self.backbone.device.type
        # The meta device, where bytes are counted, has no autocast.
        plain = dtype == torch.float32 or device == "meta"
        with nullcontext() if plain else torch.autocast(device, dtype):
            return [x.float() for x in self.heads(maps)]

"""What a method of distillation is: what it needs stored, one training step, who learns in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rapm.config import Config
from rapm.losses import pseudo_huber
from rapm.network import STUDENT, Backbone
from rapm.optim import Learner
from rapm.sampling import Conditioning, ddim, repeat
from rapm.schedule import Schedule


class Row(Protocol):
    """One trajectory: positions [N + 1, C, H, W] and [N, C, H, W], its prompt without a batch."""

    @property
    def absolute(self) -> Tensor: ...
    @property
    def intermediate(self) -> Tensor: ...
    @property
    def conditioning(self) -> Conditioning: ...


class Store(Protocol):
    """Trajectories, and what the teacher's guidance leads away from, [1, ...] each."""

    unconditional: Conditioning

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class Batch:
    """B trajectories; of a method that stores no positions, noise and prompts alone.

    Attributes:
        absolute: the teacher's positions z~_n at [:, n], [B, N + 1, C, H, W]; the noise is last.
        intermediate: z^Delta_{n+1} at [:, n], [B, N, C, H, W].
        conditioning: of the prompts, [B, ...] each.
    """

    absolute: Tensor
    intermediate: Tensor
    conditioning: Conditioning

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        """Trajectories of one size side by side."""
        prompts = {
            name: torch.stack([row.conditioning[name] for row in rows]).to(device)
            for name in rows[0].conditioning
        }
        absolute = torch.stack([row.absolute for row in rows]).to(device)
        return cls(absolute, torch.stack([r.intermediate for r in rows]).to(device), prompts)

    @property
    def noise(self) -> Tensor:
        """z_N, [B, C, H, W]."""
        return self.absolute[:, -1]


class Method(ABC):
    """A method of distillation. ``train`` takes any; a new one is one file and a line in METHODS.

    Args:
        config: the run's.
        backbone: the frozen network; the learners' adapters are added here.
        store: what it trains on.
    """

    stores_positions: ClassVar[bool] = True
    """Whether it learns from the teacher's stored positions, or from noise and prompts alone."""

    def __init__(
        self, config: Config, backbone: Backbone, schedule: Schedule, store: Store
    ) -> None:
        self.config, self.backbone, self.schedule = config, backbone, schedule
        self.grid = config.grid()
        settings, training = config.student, config.training
        targets = settings.targets or backbone.lora_targets
        backbone.add_adapter(STUDENT, settings.rank, targets, training.seed)
        self.student = Learner(
            backbone,
            STUDENT,
            learning_rate=settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=training.weight_decay,
            optimizer=training.optimizer,
            ema=settings.ema,
        )

    @property
    def learners(self) -> Mapping[str, Learner]:
        """By adapter, the student first: all that a checkpoint holds."""
        return {STUDENT: self.student}

    def learning(self, iteration: int) -> tuple[str, ...]:
        """Names of the learners that take a step in an iteration."""
        return (STUDENT,)

    @abstractmethod
    def training_step(
        self, iteration: int, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """Accumulates the gradients of an iteration. Returns losses to log.

        Args:
            generator: all randomness of the iteration, on the CPU.
        """

    # ---- what methods share

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """d(a, b), [B]."""
        return pseudo_huber(a, b, self.config.training.huber_c)

    def slot_groups(self, size: int | None = None) -> Iterator[list[int]]:
        """Slots N - 1 ... 0 in groups of ``size``, ``training.slot_batch`` when left out."""
        size, order = size or self.config.training.slot_batch, list(range(self.grid.slots))[::-1]
        for first in range(0, len(order), size):
            yield order[first : first + size]

    @staticmethod
    def rows(values: Sequence[float], batch: int) -> Tensor:
        """A value for each slot, for each of its ``batch`` rows: [k B]."""
        return torch.tensor(values).repeat_interleave(batch)

    def by_slot(self, weights: Sequence[float], slots: Sequence[int], batch: int) -> Tensor:
        """A slot's weight for each row, [k B, 1, 1, 1]; losses are means over the batch."""
        rows = self.rows([weights[n] / batch for n in slots], batch)
        return rows.to(self.backbone.device)[:, None, None, None]

    def student_starts(self, slots: Sequence[int], z: Tensor, prompts: Conditioning) -> Tensor:
        """z_{n+1} of neighbouring slots, [k B, C, H, W], from the first one's; no gradient.

        Given its start each slot is independent, so one pass then serves them all.
        """
        timesteps = [self.grid.coarse(n + 1) for n in slots]
        with torch.no_grad(), self.backbone.adapter(STUDENT):
            walk = ddim(self.backbone, self.schedule, z, timesteps, prompts)
            return torch.cat([z, *(step.end for step in walk)])

    def student_step(
        self, slots: Sequence[int], z: Tensor, prompts: Conditioning, t: Sequence[int] | None = None
    ) -> Tensor:
        """The student's single step from z to t_n, for k slots side by side, [k B, C, H, W].

        Args:
            prompts: of the B trajectories.
            t: where each slot's rows stand; at t_{n+1} when left out.
        """
        size = len(z) // len(slots)
        start = self.rows(t or [self.grid.coarse(n + 1) for n in slots], size)
        end = self.rows([self.grid.coarse(n) for n in slots], size)
        with self.backbone.adapter(STUDENT):
            walk = ddim(self.backbone, self.schedule, z, [start, end], repeat(prompts, len(slots)))
            return next(walk).end


class Losses(defaultdict[str, float]):
    """Losses to log: means over slots and batch; and where slots are named, ``NAME/n`` of each."""

    def __init__(self, slots: int, batch: int) -> None:
        super().__init__(float)
        self.slots, self.batch = slots, batch
        self.share = 1 / (slots * batch)  # of one row

    def add(self, name: str, rows: Tensor, slots: Sequence[int] = ()) -> None:
        """Adds one slot's rows, or several slots', [k B]."""
        means = [float(mean) for mean in rows.detach().reshape(-1, self.batch).mean(1)]
        self[name] += sum(means) / self.slots
        self.update({f"{name}/{n}": mean for n, mean in zip(slots, means, strict=False)})

"""A run's settings, and what in them has to fit together; ``settings.py`` reads files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, model_validator

from rapm.errors import UserError
from rapm.schedule import Grid
from rapm.sections import (
    Discriminators,
    Evaluate,
    MidpointSettings,
    RapmSettings,
    Samples,
    Section,
    Student,
    Training,
    Trajectories,
)

MethodName = Literal["rapm", "midpoint"]


class Config(Section):
    """A whole run."""

    method: MethodName = "rapm"
    """rapm, the paper's; or midpoint, ours."""
    teacher: str = "toy"
    """``toy``; a folder in diffusers' layout; a .safetensors checkpoint; a hub id, ``owner/name``
    or ``owner/name@revision``; ``random:sd15`` or ``random:sdxl``."""
    teacher_config: str = ""
    """For a single .safetensors checkpoint: folder in diffusers' layout with the configs and
    tokenizers that go with it."""
    teacher_loras: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """LoRA files to fuse into the teacher, ``FILE`` or ``FILE:STRENGTH``, in diffusers' or kohya's
    form."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the frozen network computes in; adapters, losses and positions are float32 always.
    float16 is for GPUs without bfloat16 (RTX 20 and older)."""
    base_precision: Literal["same", "int8", "nf4"] = "same"
    """What the frozen network's large weights are held in, to be brought back where they are used.
    int8 is half of bfloat16; nf4, a quarter, takes bitsandbytes. same: as ``precision``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto takes a GPU when there is one."""
    trajectories: Trajectories = Trajectories()
    student: Student = Student()
    discriminators: Discriminators = Discriminators()
    rapm: RapmSettings = RapmSettings()
    midpoint: MidpointSettings = MidpointSettings()
    training: Training = Training()
    samples: Samples = Samples()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        for key, reader in unread(self.method).items():
            if key in set(_keys_set(self)):
                raise ValueError(
                    f"{key} is not read by method '{self.method}'; method '{reader}' reads it"
                )
        try:
            self.grid()
        except ValueError as error:
            raise ValueError(
                f"trajectories.slots, .fine_steps and rapm.delta do not fit together: {error}"
            ) from None
        slots = self.trajectories.slots
        own = {"rapm": "absolute_weight", "midpoint": "weight"}[self.method]
        weights = getattr(getattr(self, self.method), own)
        if isinstance(weights, list) and len(weights) != slots:
            raise ValueError(
                f"{self.method}.{own} has {len(weights)} weights for N = {slots} slots"
            )
        if not any(self.slot_weights(weights)) and not (
            self.method == "rapm" and self.rapm.relative
        ):
            raise ValueError(f"{self.method}.{own} is 0: nothing to learn")
        if self.training.batch_size > 1 and len(self.trajectories.sizes()) > 1:
            raise ValueError(
                "trajectories.size names several sizes; pictures of different size fit in no "
                "batch: training.batch_size = 1"
            )
        return self

    def grid(self) -> Grid:
        """The timesteps of this run. Midpoint's fine steps halve each slot."""
        if self.method == "midpoint":
            return Grid(self.trajectories.slots, fine_steps=2, delta=1)
        return Grid(self.trajectories.slots, self.trajectories.fine_steps, self.rapm.delta)

    def samples_due(self, done: int) -> bool:
        """Whether pictures are drawn after so many iterations; before the first and after the last
        they are."""
        total = self.training.iterations
        return done == total or done % (self.samples.every or math.ceil(total / 20)) == 0

    def scores_due(self, done: int) -> bool:
        """Whether scores are taken after so many iterations."""
        every = self.evaluate.every
        return every > 0 and (done == self.training.iterations or done % every == 0)

    def slot_weights(self, weights: float | list[float]) -> list[float]:
        """One for each slot n = 0 ... N - 1."""
        return weights if isinstance(weights, list) else [weights] * self.trajectories.slots

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    @property
    def precisions(self) -> str:
        """What the network computes in, and holds its weights in where that differs."""
        held = "" if self.base_precision == "same" else f", {self.base_precision}"
        return f"{self.precision}{held}"

    @property
    def torch_device(self) -> str:
        """Where this run computes.

        Raises:
            UserError: ``cuda`` was asked for and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "device = 'cuda' but torch sees no GPU; use 'cpu' or 'auto', or install torch for "
                "your GPU"
            )
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return auto if self.device == "auto" else self.device


def unread(method: MethodName) -> dict[str, MethodName]:
    """Keys that a method does not read, and the one that does."""
    if method == "rapm":
        return {key: "midpoint" for key in keys(Config) if key.startswith("midpoint.")}
    rollout = ("trajectories.fine_steps", "trajectories.shard_size")
    own = ("rapm.", "discriminators.", *rollout)
    return {key: "rapm" for key in keys(Config) if key.startswith(own)}


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key there is, such as ``training.iterations``."""
    for name, info in section.model_fields.items():
        kind: Any = info.annotation
        nested = isinstance(kind, type) and issubclass(kind, Section)
        yield from keys(kind, f"{prefix}{name}.") if nested else [prefix + name]


def _keys_set(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Every key that was given, and not left to its default."""
    for name in section.model_fields_set:
        value = getattr(section, name)
        nested = isinstance(value, Section)
        yield from _keys_set(value, f"{prefix}{name}.") if nested else [prefix + name]

"""The settings of a run: typed, validated, each with its one default. ``settings.py`` reads files.

Defaults are the paper's, or PCM's (arXiv 2405.18407) where the paper is silent; docs/method.md says
which is which. What suits another method better is in ``configs/methods/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rapm.errors import UserError
from rapm.schedule import Grid

Positive = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=4096)]  # what memory holds side by side
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MethodName = Literal["rapm", "midpoint"]
LARGEST_SIDE = 16384  # pixels
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


class Section(BaseModel):
    """A table of the file. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Trajectories(Section):
    """The teacher's sampling trajectories, or what they start from."""

    prompts: str = ""
    """A .txt, .csv, .tsv, .jsonl or .parquet file, or ``hub:OWNER/NAME``. Empty: the teacher's own
    captions, if it brings some."""
    count: Positive = 1000
    """Number of trajectories; prompts are taken in order, over again when there are fewer."""
    slots: Annotated[int, Field(ge=1, le=16)] = 4
    """N, the student's number of steps."""
    fine_steps: Positive = 25
    """M, the teacher's steps in a slot."""
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 7.5
    """The teacher's, baked into the student; 1 is none."""
    negative_prompt: str = ""
    """What the teacher is guided away from."""
    size: str = ""
    """Pixels, WIDTHxHEIGHT; several, separated by commas, are taken in turn. Empty: the teacher's
    own."""
    seed: Seed = 0
    """Trajectory k starts from the noise of (seed, k), unless its prompt has a seed of its own."""
    batch_size: Few = 8
    """Trajectories rolled out, and pictures sampled, side by side; costs memory, changes nothing.
    """
    shard_size: Positive = 20
    """Trajectories in a file; what a kill can cost."""

    def sizes(self) -> list[tuple[int, int] | None]:
        """(width, height) of each size; None for the teacher's own."""
        return [(int(w), int(h)) for w, h in _SIZE.findall(self.size)] or [None]

    @field_validator("size")
    @classmethod
    def _is_sizes(cls, text: str) -> str:
        if text and not re.fullmatch(rf"{_SIZE.pattern}(, *{_SIZE.pattern})*", text):
            raise ValueError(
                "write WIDTHxHEIGHT in pixels, several with commas between: 1024x1024,896x1152"
            )
        if any(len(side) > 5 or int(side) > LARGEST_SIDE for side in re.findall(r"\d+", text)):
            raise ValueError(f"no side may have more than {LARGEST_SIDE} pixels")
        return text


class Student(Section):
    """The student's LoRA and how it learns."""

    rank: Few = 16
    """LoRA rank; alpha is the rank (scale 1)."""
    targets: list[str] = []
    """Names of the modules that get LoRA; empty: all attention, feed-forward and convolutions."""
    learning_rate: Rate = 1e-4
    """AdamW, betas 0.9 and 0.999; see also ``training.warmup`` and ``training.decay``."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average over the student's weights, to sample and export; 0 is none."""


class Discriminators(Section):
    """D_rel and D_abs: a LoRA and heads each, and how they learn."""

    adversarial_weight: Weight = 0.1
    """lambda, of the adversarial term; 0 trains on distances alone, without discriminators."""
    weighting: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: lambda is the length of the adversarial gradient at the student's position over
    that of the distance's."""
    loss: Literal["hinge", "relativistic"] = "hinge"
    """Whether each of the two is the teacher's (hinge), or which of them is (relativistic)."""
    noise: Literal["independent", "shared"] = "independent"
    """Real and fake are seen each under its own noise, or under the same."""
    schedule: Literal["alternate", "joint"] = "alternate"
    """alternate: even iterations update both discriminators, odd ones the student. joint: every
    iteration updates all."""
    rank: Few = 8
    """LoRA rank of each."""
    targets: list[str] = []
    """As for the student."""
    head_width: Annotated[int, Field(ge=4, le=4096, multiple_of=4)] = 64
    """Channels of each head."""
    learning_rate: Rate = 1e-4
    """AdamW, betas 0 and 0.999."""


class RapmSettings(Section):
    """RAPM's positions and losses."""

    delta: Positive = 1
    """Length of the teacher's one step to the intermediate position, in fine steps."""
    relative: bool = True
    """Whether there is a relative loss."""
    absolute_weight: Weight | list[Weight] = 1.0
    """w_n, of the absolute loss; a number, or one for each slot n = 0 ... N - 1. 0: none."""
    detach_relative: bool = True
    """The first detach: no gradient through the relative position."""
    detach_slots: bool = True
    """The second detach: no gradient across slots. Without it all slots share one graph."""


class MidpointSettings(Section):
    """Midpoint's losses."""

    weight: Weight | list[Weight] = 1.0
    """w_n, of the distance; a number, or one for each slot n = 0 ... N - 1."""


class Training(Section):
    """The loop."""

    iterations: Positive = 20_000
    """Of all kinds: where discriminators and student take turns, both kinds count."""
    batch_size: Few = 1
    """Trajectories in an iteration."""
    slot_batch: Few = 1
    """Slots in one pass: 1 needs least memory, N is fastest where one slot does not fill the GPU.
    """
    huber_c: Rate = 1e-3
    """c of the pseudo-Huber distance."""
    warmup: Annotated[int, Field(ge=0, le=10**9)] = 20
    """Iterations over which all learning rates rise from zero."""
    decay: Fraction = 0.0
    """Share of the iterations, at the end, over which all learning rates fall linearly to zero."""
    gradient_clip: Rate = 1.0
    """Largest norm of a learner's gradient."""
    weight_decay: Weight = 1e-3
    """AdamW, all learners."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit holds AdamW's state in 8 bits (arXiv 2110.02861); takes bitsandbytes."""
    gradient_checkpointing: bool = True
    """Trade a second forward for memory; the same gradients."""
    compile: bool = False
    """torch.compile of the network's repeated blocks: results within rounding, which is checked
    before the first iteration. Minutes at the start."""
    seed: Seed = 0
    """Of everything drawn in training and of the adapters' first weights."""
    checkpoint_every: Positive = 500
    """Iterations between checkpoints; one is written every 15 minutes besides, and at the end."""
    keep_checkpoints: Positive = 2
    """How many are kept."""


class Samples(Section):
    """Pictures while it trains: the same prompts and seeds again and again, one row each time."""

    every: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Iterations between rows; 0: 20 rows in a run."""
    count: Annotated[int, Field(ge=0, le=64)] = 8
    """Pictures in a row; 0: none."""


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
    teacher_loras: list[str] = []
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

    def slot_weights(self, weights: float | list[float]) -> list[float]:
        """One for each slot n = 0 ... N - 1."""
        return weights if isinstance(weights, list) else [weights] * self.trajectories.slots

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

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

"""The sections of a run's settings: typed, validated, each key with its one default.

Defaults are the paper's, or PCM's (arXiv 2405.18407) where the paper is silent; docs/method.md says
which is which. What suits another method better is in ``configs/methods/``.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=4096)]  # what memory holds side by side
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
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
    count: Annotated[int, Field(ge=1, le=10**7)] = 1000
    """Number of trajectories; prompts are taken in order, over again when there are fewer."""
    slots: Annotated[int, Field(ge=1, le=16)] = 4
    """N, the student's number of steps."""
    fine_steps: Positive = 25
    """M, the teacher's steps in a slot."""
    guidance_scale: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = 7.5
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


class Evaluate(Section):
    """Scores while it trains, where the teacher has an oracle: the toy teacher's."""

    every: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Iterations between scores of 200 validation captions; 0: none."""

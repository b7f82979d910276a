"""What to say where memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from rapm.config import Config
from rapm.errors import UserError

Stage = Literal["trajectories", "training", "pictures"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says so; a CPU has no error type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def within_memory(config: Config, stage: Stage) -> Iterator[None]:
    """Tells what to change when memory does not suffice.

    Raises:
        UserError: it did not.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free, others = save_memory(config, stage)
        raise UserError(
            f"memory does not suffice for {stage}; what is finished is kept. In order of effect: "
            f"{', '.join(free) or 'nothing'} (the run goes on); {', '.join(others)} "
            "(another --out); each by --set of 'rapm distill'"
        ) from None


def save_memory(config: Config, stage: Stage) -> tuple[list[str], list[str]]:
    """Settings that would lower a stage's memory, the most effective first.

    Returns:
        Those that a run can go on with, and the others.
    """
    training, rank, in_training = config.training, config.student.rank, stage == "training"
    held = stage != "pictures"  # those are drawn on the whole network
    free = {
        "training.gradient_checkpointing=true": in_training and not training.gradient_checkpointing,
        "training.slot_batch=1": in_training and training.slot_batch > 1,
        "trajectories.batch_size=1": not in_training and config.trajectories.batch_size > 1,
    }
    others = {
        "precision=bfloat16": config.precision == "float32",
        "training.batch_size=1": in_training and training.batch_size > 1,
        "base_precision=int8": held and config.base_precision == "same",
        "base_precision=nf4": held and config.base_precision != "nf4",
        "training.optimizer=adamw8bit": in_training and training.optimizer == "adamw",
        f"student.rank={rank // 2}": in_training and rank > 1,
        "a smaller trajectories.size": True,
    }
    return [name for name, helps in free.items() if helps], [
        n for n, helps in others.items() if helps
    ]

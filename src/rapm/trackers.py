"""Other programs' logs of a run. ``metrics.jsonl`` stays the truth; they are told the same."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rapm import settings
from rapm.errors import UserError
from rapm.run import Run

TRACKERS = ("tensorboard", "wandb")


class Tracker(Protocol):
    """What a run is shown in besides its own page."""

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, Path]) -> None:
        """Takes values and PNG files of an iteration; iterations rise, and come back after a
        kill."""

    def close(self) -> None:
        """Writes what is left."""


def check_tracker(name: str) -> None:
    """Before hours of work; no name is none.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    if name and name not in TRACKERS:
        raise UserError(f"there is no tracker '{name}'; there are: {', '.join(TRACKERS)}")
    if name and find_spec(name) is None:
        raise UserError(f"--tracker {name} takes the package {name}: pip install 'rapm[track]'")


def open_tracker(name: str, run: Run) -> Tracker:
    """The tracker of that name.

    Raises:
        UserError: there is none, or its package is not installed.
    """
    check_tracker(name)
    return TensorBoard(run) if name == "tensorboard" else WandB(run)


class TensorBoard:
    """Events in the run's ``tensorboard/``: ``tensorboard --logdir runs`` shows them."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What comes after the newest checkpoint is about to be logged again.
        first = max(run.checkpoint_steps(), default=0)
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=first)

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, Path]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for name, file in images.items():
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project "rapm", named after the folder; WANDB_MODE=offline keeps it here. Going
    on after a stop begins another one."""

    def __init__(self, run: Run) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        config = settings.flatten(run.config.model_dump())
        name = run.folder.resolve().name
        self._wandb: Any = wandb
        self._run = wandb.init(project="rapm", name=name, dir=str(run.folder), config=config)

    def log(self, step: int, values: Mapping[str, float], images: Mapping[str, Path]) -> None:
        shown = {name: self._wandb.Image(str(file)) for name, file in images.items()}
        self._run.log({**values, **shown}, step=step)

    def close(self) -> None:
        self._run.finish()

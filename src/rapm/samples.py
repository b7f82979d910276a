"""Pictures while a run trains: the same prompts and seeds again and again, and what they show."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rapm.evaluate.metrics import brightness, contrast, layout_distance, sharpness
from rapm.memory import is_out_of_memory
from rapm.methods import Method
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER
from rapm.pictures import (
    FEW_STEP_GUIDANCE,
    Row,
    decode,
    facts_of_picture,
    fitting,
    image_grid,
    save,
    to_pictures,
)
from rapm.run import Run
from rapm.sampling import ddim, guided, picture_noise
from rapm.schedule import trailing_timesteps
from rapm.trajectories import Trajectory, TrajectoryStore

MANY, FEW = "teacher.png", "teacher-few.png"
OF_TEACHER, OF_STUDENT = "trajectory-teacher.png", "trajectory-student.png"


class TrainingSamples:
    """Draws the same prompts and seeds again and again while a run trains.

    Each row is ``samples/iteration-*.png``; all of them, with the teacher above, are one strip,
    ``samples/iterations.png``: the paper's Figure 3. The first prompt's trajectory, as the clean
    pictures predicted at the coarse timesteps, is a row of its own. Prompts are the trajectories'
    first ones, which are encoded already; noise is new. The VAE is loaded for the moment. Too
    little memory is said once, and training goes on without pictures.
    """

    def __init__(self, run: Run, teacher: Teacher, method: Method, store: TrajectoryStore) -> None:
        self.run, self.teacher, self.method, self.store = run, teacher, method, store
        self.count = min(run.config.samples.count, len(store.prompts))
        # Where sizes differ, those of the first one's: pictures of one strip are alike.
        self.rows = [store[k] for k in range(len(store.prompts))] if self.count else []
        shape = self.rows[0].absolute.shape[1:] if self.rows else ()
        self.rows = [row for row in self.rows if row.absolute.shape[1:] == shape][: self.count]

    def __call__(self, iteration: int) -> dict[str, float]:
        """Draws a row of the student as it stands. Returns what it measures, see :func:`measures`;
        nothing where it could not be drawn."""
        if not self.rows:
            return {}
        folder = self.run.samples
        try:
            if iteration == 0:  # an attempt that got to no checkpoint may have left some
                for file in (folder / MANY, folder / FEW, *folder.glob("iteration-*.png")):
                    file.unlink(missing_ok=True)
            self._draw_teacher()
            with self.method.student.averaged():
                scale = self.run.config.trajectories.guidance_scale
                scale, file = self.teacher.student_guidance(scale), row_file(folder, iteration)
                self._draw(STUDENT, self.method.grid.slots, scale, file)
            made = [k for k in drawn_iterations(self.run) if k <= iteration]
            self._strip(made)
            return measures(folder, made)
        except (RuntimeError, OSError) as error:
            if not (is_out_of_memory(error) or isinstance(error, OSError)):
                raise
            warnings.warn(f"no pictures while training: {error}", stacklevel=2)
            self.rows = []
            return {}

    def _draw_teacher(self) -> None:
        folder, scale = self.run.samples, self.run.config.trajectories.guidance_scale
        slots = self.method.grid.slots
        if not (folder / MANY).is_file():
            self._draw(TEACHER, many_steps(slots), scale, folder / MANY)
        if not (folder / FEW).is_file():
            self._draw(TEACHER, slots, min(scale, FEW_STEP_GUIDANCE), folder / FEW)

    @torch.no_grad()
    def _draw(self, adapter: str, num_steps: int, guidance_scale: float, file: Path) -> None:
        """A row, and of the first prompt the clean pictures predicted at the coarse timesteps."""
        backbone, schedule = self.method.backbone, self.teacher.schedule
        denoiser = guided(backbone, self.store.unconditional, guidance_scale)
        slots, size = self.method.grid.slots, self.run.config.trajectories.batch_size
        timesteps = trailing_timesteps(num_steps, schedule.num_train_timesteps)
        latents, clean = [], []
        with backbone.adapter(adapter):
            for first in range(0, len(self.rows), size):
                rows = self.rows[first : first + size]
                z, prompts = self._start(rows, first, guidance_scale)
                for k, step in enumerate(ddim(denoiser, schedule, z, timesteps, prompts)):
                    if first == 0 and k % (num_steps // slots) == 0:
                        x0, _ = schedule.x0_and_eps(step.z, step.prediction, timesteps[k])
                        clean.append(x0[:1])
                    z = step.end
                latents.append(z)
        z = torch.cat([*latents, *clean])
        pictures = to_pictures(decode(self.teacher, z, backbone.dtype, backbone.device), 64)
        save_row(pictures[: len(self.rows)], file)
        if file.name != FEW:
            path = [*pictures[len(self.rows) :], pictures[0]]
            name = OF_TEACHER if adapter == TEACHER else OF_STUDENT
            save_row(path, file.with_name(name))

    def _start(
        self, rows: Sequence[Trajectory], first: int, guidance_scale: float
    ) -> tuple[Tensor, dict[str, Any]]:
        """Noise and prompts of some pictures."""
        own = self.teacher.of_picture(self.run.config.trajectories.sizes()[0], guidance_scale)
        own = {name: x[0] for name, x in own.items()}
        each = [{**row.conditioning, **own} for row in rows]
        seeds = range(first, first + len(rows))
        z = torch.stack([picture_noise(k, rows[0].absolute.shape[1:]) for k in seeds])
        prompts = {name: torch.stack([told[name] for told in each]) for name in each[0]}
        return z.to(self.method.backbone.device), prompts

    def _strip(self, made: Sequence[int]) -> None:
        """Rows of earlier iterations that the run has not gone back beyond."""
        folder, steps = self.run.samples, self.method.grid.slots
        titled = [("teacher, many steps", folder / MANY), (f"teacher, {steps} steps", folder / FEW)]
        titled += [(f"{k:,} iterations", row_file(folder, k)) for k in made]
        rows: list[Row] = []
        for title, file in titled:
            with Image.open(file) as picture:
                rows.append((title, [picture.copy()]))
        image_grid(rows, folder / "iterations.png")


def many_steps(slots: int) -> int:
    """The teacher's: about twenty, by way of the coarse timesteps."""
    return slots * -(-20 // slots)


def row_file(folder: Path, iteration: int) -> Path:
    return folder / f"iteration-{iteration:08d}.png"


def drawn_iterations(run: Run) -> list[int]:
    """Those that a row was drawn at."""
    return sorted(int(f.stem.split("-")[1]) for f in run.samples.glob("iteration-*.png"))


def cut(file: Path) -> list[Image.Image]:
    """The pictures of a row.

    Raises:
        OSError: it cannot be read, or is none.
    """
    facts = facts_of_picture(file)
    if not isinstance(facts, dict) or "pictures" not in facts:
        raise OSError(f"{file} is no row of pictures, or damaged")
    with Image.open(file) as picture:
        width, height = picture.width // facts["pictures"], picture.height
        boxes = [(k * width, 0, (k + 1) * width, height) for k in range(facts["pictures"])]
        return [picture.convert("RGB").crop(box) for box in boxes]


def measures(folder: Path, made: Sequence[int]) -> dict[str, float]:
    """What the newest row shows beside the teacher's many steps.

    Args:
        made: iterations that a row was drawn at, at least one.

    Returns:
        ``brightness``, ``contrast``, ``sharpness``: ratios to the teacher's. Of several pictures
        also ``to_teacher``, the distance between the student's layout and the teacher's, and after
        the first row ``moved``, the distance from the row before; 1 is the distance between
        different prompts.
    """

    def images(file: Path) -> Tensor:
        values = np.stack([np.asarray(p) for p in cut(file)])
        return torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1

    teacher, row = images(folder / MANY), images(row_file(folder, made[-1]))
    found = {
        name: float(measure(row).mean() / measure(teacher).mean().clamp(min=1e-6))
        for name, measure in (
            ("brightness", brightness),
            ("contrast", contrast),
            ("sharpness", sharpness),
        )
    }
    apart = layout_distance(teacher, teacher.roll(1, 0))
    if apart > 0:
        found["to_teacher"] = layout_distance(row, teacher) / apart
        if len(made) > 1:
            before = images(row_file(folder, made[-2]))
            found["moved"] = layout_distance(row, before) / apart
    return {name: round(value, 4) for name, value in found.items()}


def save_row(pictures: Sequence[Image.Image], file: Path) -> None:
    """Writes them side by side; the file says how many there are, for :func:`cut`."""
    ((_, pictures),) = fitting([("", pictures)])
    row = Image.fromarray(np.hstack([np.asarray(picture) for picture in pictures]))
    save(row, file, {"pictures": len(pictures)})

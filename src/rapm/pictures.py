"""Pictures: image grids, rows drawn while training, and what the trajectories look like."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rapm.errors import UserError
from rapm.io import complete_or_absent
from rapm.memory import is_out_of_memory, within_memory
from rapm.methods import Method
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER
from rapm.run import Run
from rapm.sampling import guided, picture_noise, sample
from rapm.trajectories import Trajectory, TrajectoryStore

TEACHER_STEPS = 20
GAP, TITLE, CAPTION = 4, 22, 12  # pixels
Row = tuple[str, Sequence[Image.Image]]


def to_pictures(images: Tensor, min_side: int = 0) -> list[Image.Image]:
    """Of float [n, 3, H, W] in [-1, 1]; small ones are enlarged to ``min_side`` pixels or so."""
    values = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    scale = max(1, min_side // images.shape[-1])
    size = images.shape[-1] * scale, images.shape[-2] * scale
    return [Image.fromarray(v).resize(size, Image.Resampling.NEAREST) for v in values]


def image_grid(
    rows: Sequence[Row],
    file: Path,
    *,
    captions: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PNG: a row of pictures for each (title, pictures), the title above it.

    Args:
        captions: of the columns, below the last row.
        facts: what made it, as JSON, for :func:`facts_of_picture`.
    """
    sizes = [picture.size for _, pictures in rows for picture in pictures]
    width, height = (max(size[k] for size in sizes) for k in (0, 1))
    columns = max(len(pictures) for _, pictures in rows)
    below = [_wrapped(caption, width) for caption in captions]
    bottom = len(rows) * (height + GAP + TITLE) + GAP
    lines = max((text.count("\n") + 1 for text in below), default=0)
    size = columns * (width + GAP) + GAP, bottom + lines * (CAPTION + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for c, text in enumerate(below):
        at = c * (width + GAP) + GAP, bottom
        draw.multiline_text(at, text, fill="black", font_size=CAPTION, spacing=GAP)
    for r, (title, pictures) in enumerate(rows):
        top = r * (height + GAP + TITLE) + GAP
        draw.text((GAP, top), title, fill="black", font_size=15)
        for c, picture in enumerate(pictures):
            canvas.paste(picture, (c * (width + GAP) + GAP, top + TITLE))
    save(canvas, file, facts)


def _wrapped(text: str, width: int) -> str:
    """In lines that fit; what is beyond the sixth is left out."""
    draw, lines = ImageDraw.Draw(Image.new("RGB", (1, 1))), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font_size=CAPTION) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:5] + (["..."] if len(lines) > 6 else lines[5:]))


def save(picture: Image.Image, file: Path, facts: Mapping[str, Any] | None = None) -> None:
    info = PngInfo()
    if facts is not None:
        info.add_itxt("rapm", json.dumps(facts))
    with complete_or_absent(file) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def facts_of_picture(file: Path) -> Any:
    """What :func:`image_grid` was told of a PNG; None where it is another program's or damaged."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return json.loads(picture.info["rapm"])
    except (OSError, ValueError, KeyError, SyntaxError):
        return None


class TrainingSamples:
    """Draws the same prompts and seeds again and again while a run trains.

    Each row is ``samples/iteration-*.png``; all of them, with the teacher above, are one strip,
    ``samples/iterations.png``: the paper's Figure 3. Prompts are the trajectories' first ones,
    which are encoded already; noise is new. The VAE is loaded for the moment. Too little memory is
    said once, and training goes on without pictures.
    """

    def __init__(self, run: Run, teacher: Teacher, method: Method, store: TrajectoryStore) -> None:
        self.run, self.teacher, self.method, self.store = run, teacher, method, store
        self.count = min(run.config.samples.count, len(store.prompts))
        # Where sizes differ, those of the first one's: pictures of one strip are alike.
        self.rows = [store[k] for k in range(len(store.prompts))] if self.count else []
        shape = self.rows[0].absolute.shape[1:] if self.rows else ()
        self.rows = [row for row in self.rows if row.absolute.shape[1:] == shape][: self.count]

    def __call__(self, iteration: int) -> None:
        if not self.rows:
            return
        folder = self.run.samples
        try:
            if iteration == 0:  # an attempt that got to no checkpoint may have left some
                for file in (folder / "teacher.png", *folder.glob("iteration-*.png")):
                    file.unlink(missing_ok=True)
            if not (folder / "teacher.png").is_file():
                save(self._row(TEACHER, TEACHER_STEPS), folder / "teacher.png")
            with self.method.student.averaged():
                row = self._row(STUDENT, self.method.grid.slots)
            save(row, folder / f"iteration-{iteration:08d}.png")
            self._strip(iteration)
        except (RuntimeError, OSError) as error:
            if not (is_out_of_memory(error) or isinstance(error, OSError)):
                raise
            warnings.warn(f"no pictures while training: {error}", stacklevel=2)
            self.rows = []

    @torch.no_grad()
    def _row(self, adapter: str, num_steps: int) -> Image.Image:
        backbone, trajectories = self.method.backbone, self.run.config.trajectories
        denoiser: Any = backbone
        if adapter == TEACHER:
            denoiser = guided(backbone, self.store.unconditional, trajectories.guidance_scale)
        latents, size = [], trajectories.batch_size
        with backbone.adapter(adapter):
            for first in range(0, len(self.rows), size):
                rows = self.rows[first : first + size]
                seeds = range(first, first + len(rows))
                z = torch.stack([picture_noise(k, rows[0].absolute.shape[1:]) for k in seeds])
                prompts = {
                    name: torch.stack([row.conditioning[name] for row in rows])
                    for name in rows[0].conditioning
                }
                z = z.to(backbone.device)
                latents.append(sample(denoiser, self.teacher.schedule, z, prompts, num_steps))
        images = decode(self.teacher, torch.cat(latents), backbone.dtype, backbone.device)
        return Image.fromarray(np.hstack([np.asarray(p) for p in to_pictures(images, 64)]))

    def _strip(self, iteration: int) -> None:
        """Rows of earlier iterations that the run has not gone back beyond."""
        folder = self.run.samples
        made = sorted((int(f.stem.split("-")[1]), f) for f in folder.glob("iteration-*.png"))
        titled = [(f"teacher, {TEACHER_STEPS} steps", folder / "teacher.png")]
        titled += [(f"{k:,} iterations", file) for k, file in made if k <= iteration]
        rows: list[Row] = []
        for title, file in titled:
            with Image.open(file) as picture:
                rows.append((title, [picture.copy()]))
        image_grid(rows, folder / "iterations.png")


def decode(teacher: Teacher, z: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images [n, 3, H, W] in [-1, 1] of latents [n, C, h, w]; the VAE is loaded for it."""
    half = dtype == torch.float16  # where SDXL's VAE overflows
    vae = teacher.load(["vae"], torch.float32 if half else dtype, str(device))
    return teacher.family.decode(vae, z)


def show_trajectories(run: Run, count: int) -> Path:
    """Stored trajectories as pictures: the teacher's positions at the coarse timesteps.

    Two rows each: the positions themselves, decoded; and below, the clean picture that the teacher
    predicted there.

    Raises:
        UserError: there are no stored positions.
    """
    config, grid = run.config, run.config.grid()
    store, teacher = TrajectoryStore.open(run.trajectories), teacher_of(config)
    if not store.manifest["shard_size"]:
        raise UserError(
            f"method '{config.method}' stores no trajectories: there is nothing to show"
        )
    slots, rows = list(range(grid.slots))[::-1], []
    times = ", ".join(str(grid.coarse(n + 1)) for n in slots)

    def predicted(row: Trajectory, n: int) -> Tensor:
        ends = row.absolute[n + 1][None], row.intermediate[n][None]
        return teacher.schedule.x0_of_step(*ends, grid.coarse(n + 1), grid.intermediate(n))[0]

    device = torch.device(config.torch_device)
    for k in range(min(count, len(store))):
        row = store[k]
        clean = torch.stack([*(predicted(row, n) for n in slots), row.absolute[0]])
        both = torch.cat([row.absolute.flip(0), clean])
        with within_memory(config, "pictures"):
            images = decode(teacher, both, config.torch_dtype, device)
        pictures = to_pictures(images, 128)
        rows += [
            (f"{row.prompt}: positions at {times} and the end", pictures[: len(clean)]),
            ("the clean picture predicted there", pictures[len(clean) :]),
        ]
    file = run.samples / "trajectories.png"
    image_grid(rows, file)
    return file

"""Pictures: image grids, and what the trajectories look like."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.Image import DecompressionBombError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rapm.errors import UserError
from rapm.io import complete_or_absent
from rapm.memory import within_memory
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher
from rapm.run import Run
from rapm.trajectories import Trajectory, TrajectoryStore

FEW_STEP_GUIDANCE = 3.0  # at most, as high guidance breaks pictures of few steps; docs/toy.md
GAP, TITLE, CAPTION = 4, 22, 12  # pixels
MOST_PIXELS = 64 << 20  # of a sheet; programs refuse to open much larger ones
Row = tuple[str, Sequence[Image.Image]]


def to_pictures(images: Tensor, min_side: int = 0) -> list[Image.Image]:
    """Of float [n, 3, H, W] in [-1, 1]; small ones are enlarged to ``min_side`` pixels or so."""
    values = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    scale = max(1, min_side // images.shape[-1])
    size = images.shape[-1] * scale, images.shape[-2] * scale
    return [Image.fromarray(v).resize(size, Image.Resampling.NEAREST) for v in values]


def fitting(rows: Sequence[Row]) -> list[Row]:
    """The same, scaled down where they are too many pixels for a sheet."""
    pixels = sum(picture.width * picture.height for _, row in rows for picture in row)
    scale = min(1.0, math.sqrt(MOST_PIXELS / pixels))

    def scaled(picture: Image.Image) -> Image.Image:
        width, height = (max(1, int(side * scale)) for side in picture.size)
        return picture if scale == 1 else picture.resize((width, height))

    return [(title, [scaled(picture) for picture in row]) for title, row in rows]


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
    rows = fitting(rows)
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
    except (OSError, ValueError, KeyError, SyntaxError, RecursionError, DecompressionBombError):
        return None


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

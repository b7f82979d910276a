"""Few-step sampling from a teacher or a student, and sheets of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rapm.errors import UserError
from rapm.io import complete_or_absent, under_prefix
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher, move
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import Conditioning, Denoiser
from rapm.run import Run
from rapm.schedule import Schedule, trailing_timesteps
from rapm.trajectories import check_facts, guided, picture_noise


@torch.no_grad()
def sample(
    denoiser: Denoiser, schedule: Schedule, z: Tensor, conditioning: Conditioning, num_steps: int
) -> Tensor:
    """Deterministic DDIM from noise z to the end in ``num_steps`` trailing steps. All [B, C, H, W],
    float32."""
    for t, s in pairwise(trailing_timesteps(num_steps, schedule.num_train_timesteps)):
        z = schedule.step(z, denoiser(z, torch.full((len(z),), t), conditioning), t, s)
    return z


class Studio:
    """A teacher and, if there is one, its student, to draw pictures with.

    Text encoders and VAE are loaded when the first prompt or picture asks for them; the encoders
    are on the GPU only while they encode.

    Args:
        backbone: the teacher's network; with a student's role or without.
        size: of the pictures, (width, height) in pixels; None is the teacher's own.
        guidance_scale: the teacher's.
        batch_size: pictures sampled side by side.
    """

    def __init__(
        self,
        teacher: Teacher,
        backbone: Backbone,
        *,
        guidance_scale: float,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        batch_size: int,
    ) -> None:
        self.teacher, self.backbone, self.guidance_scale = teacher, backbone, guidance_scale
        self.negative_prompt, self.batch_size = negative_prompt, batch_size
        self.shape = teacher.latent_shape(size)
        self._of_size = teacher.family.of_size(*(size or teacher.size()))

    @cached_property
    def _texts(self) -> Any:
        return self.teacher.load(self.teacher.family.text_parts, self.backbone.dtype, "cpu")

    @cached_property
    def _pictures(self) -> Any:
        half = self.backbone.dtype == torch.float16  # where SDXL's VAE overflows
        return self.teacher.load(
            ["vae"], torch.float32 if half else self.backbone.dtype, str(self.backbone.device)
        )

    def encode(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        """Conditioning of the prompts, [n, ...], and of the negative prompt, [1, ...]."""
        texts, family = move(self._texts, self.backbone.device), self.teacher.family
        try:
            sizes = {
                name: value.expand(len(prompts), *value.shape[1:])
                for name, value in self._of_size.items()
            }
            return family.encode(texts, prompts) | sizes, family.unconditional(
                texts, self.negative_prompt
            )
        finally:
            move(texts, "cpu")

    @torch.no_grad()
    def latents(
        self,
        role: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
    ) -> Tensor:
        """Latents [n, C, h, w] of prompt i from the noise of seed i, by the teacher (guided) or the
        student (guidance 1)."""
        side_by_side = batch_size or self.batch_size
        z = torch.stack([picture_noise(seed, self.shape) for seed in seeds])
        conditioning, unconditional = self.encode(prompts)
        scale = self.guidance_scale if role == TEACHER else 1.0
        denoiser = guided(self.backbone, unconditional, scale)
        done = []
        with self.backbone.role(role):
            for start in range(0, len(z), side_by_side):
                rows = slice(start, start + side_by_side)
                own = {name: value[rows] for name, value in conditioning.items()}
                done.append(
                    sample(
                        denoiser,
                        self.teacher.schedule,
                        z[rows].to(self.backbone.device),
                        own,
                        num_steps,
                    )
                )
        return torch.cat(done)

    def images(
        self,
        role: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
    ) -> Tensor:
        """Pictures, float32 [n, 3, H, W] in [-1, 1], on the CPU."""
        return self.decode(self.latents(role, prompts, seeds, num_steps, batch_size))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents [n, C, h, w]; as :meth:`images` returns them."""
        return self.teacher.family.decode(self._pictures, latents)


def open_studio(run: Run, *, student: bool = True) -> Studio:
    """Loads what a run's pictures take: its teacher's network and, unless told not to, its trained
    student.

    Raises:
        UserError: the run's teacher is gone or another than it was, or the run has no checkpoint
            yet.
    """
    config = run.config
    step, state = run.load_checkpoint() if student else (0, {})
    if student and not step:
        raise UserError(
            f"{run.folder} has no checkpoint yet; train it first with 'rapm train {run.folder}'"
        )
    teacher = teacher_of(config)
    check_facts(
        run.trajectories, {"teacher": teacher.fingerprint}
    )  # another network's student would be drawn
    family = teacher.family
    backbone = Backbone(
        teacher.load_network(config.torch_dtype, config.torch_device),
        family.call,
        family.lora_targets,
    )
    if student:
        backbone.add_role(
            STUDENT, config.student.rank, config.student.targets or family.lora_targets, 0
        )
        backbone.load(STUDENT, under_prefix("average", state))
    settings = config.trajectories
    return Studio(
        teacher,
        backbone,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        size=settings.sizes()[0],
        batch_size=settings.batch_size,  # what the rollout fits in, pictures fit in
    )


def to_uint8(images: Tensor) -> Tensor:
    """float [n, 3, H, W] in [-1, 1] to uint8 [n, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def sheet(rows: Sequence[tuple[str, Tensor]], file: Path, min_side: int = 128) -> None:
    """Writes a PNG: a row of pictures for each (title, images [n, 3, H, W] in [-1, 1]), the title
    above it."""
    scale = max(1, min_side // rows[0][1].shape[-1])
    height, width = (size * scale for size in rows[0][1].shape[-2:])
    gap, title = 4, 22
    columns = max(len(images) for _, images in rows)
    canvas = Image.new(
        "RGB", (columns * (width + gap) + gap, len(rows) * (height + gap + title) + gap), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for r, (text, images) in enumerate(rows):
        top = r * (height + gap + title) + gap
        draw.text((gap, top), text, fill="black", font_size=15)
        for c, pixels in enumerate(to_uint8(images).numpy()):
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (c * (width + gap) + gap, top + title))
    with complete_or_absent(file) as temporary:
        canvas.save(temporary, format="PNG")

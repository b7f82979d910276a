"""Few-step sampling from a teacher or a student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapm.errors import UserError
from rapm.io import under_prefix
from rapm.memory import within_memory
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher, move
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.optim import learnt_weights
from rapm.pictures import image_grid, to_pictures
from rapm.prompts import read_prompts
from rapm.run import Run
from rapm.sampling import Conditioning, guided, picture_noise, sample
from rapm.trajectories import check_facts, stored_prompts


class Sampler:
    """A teacher and, if there is one, its student, to draw pictures with.

    Text encoders and VAE are loaded when the first prompt or picture asks for them; the encoders
    are on the GPU only while they encode.

    Args:
        backbone: the teacher's network; with a student's adapter or without.
        guidance_scale: the teacher's.
        size: of the pictures, (width, height) in pixels; None is the teacher's own.
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
    def _vae(self) -> Any:
        half = self.backbone.dtype == torch.float16  # where SDXL's VAE overflows
        dtype = torch.float32 if half else self.backbone.dtype
        return self.teacher.load(["vae"], dtype, str(self.backbone.device))

    def encode(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        """Conditioning of the prompts, [n, ...], and of the negative prompt, [1, ...]."""
        texts, family = move(self._texts, self.backbone.device), self.teacher.family
        sizes = {n: v.expand(len(prompts), *v.shape[1:]) for n, v in self._of_size.items()}
        try:
            unconditional = family.unconditional(texts, self.negative_prompt)
            return family.encode(texts, prompts) | sizes, unconditional
        finally:
            move(texts, "cpu")

    @torch.no_grad()
    def latents(
        self,
        adapter: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
    ) -> Tensor:
        """Latents [n, C, h, w] of prompt i from the noise of seed i.

        Args:
            adapter: TEACHER, with guidance, or STUDENT, without.
        """
        side_by_side = batch_size or self.batch_size
        z = torch.stack([picture_noise(seed, self.shape) for seed in seeds])
        conditioning, unconditional = self.encode(prompts)
        scale = self.guidance_scale if adapter == TEACHER else 1.0
        denoiser, schedule = guided(self.backbone, unconditional, scale), self.teacher.schedule
        done = []
        with self.backbone.adapter(adapter):
            for start in range(0, len(z), side_by_side):
                rows = slice(start, start + side_by_side)
                own = {name: value[rows] for name, value in conditioning.items()}
                noise = z[rows].to(self.backbone.device)
                done.append(sample(denoiser, schedule, noise, own, num_steps))
        return torch.cat(done)

    def images(
        self,
        adapter: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
    ) -> Tensor:
        """Pictures, float32 [n, 3, H, W] in [-1, 1], on the CPU."""
        latents = self.latents(adapter, prompts, seeds, num_steps, batch_size)
        return self.teacher.family.decode(self._vae, latents)


def open_sampler(run: Run, *, student: bool = True) -> Sampler:
    """Loads what a run's pictures take: its teacher's network and, unless told not to, its student.

    Raises:
        UserError: the run's teacher is gone or another than it was, or the run has no checkpoint.
    """
    config, own = run.config, run.config.trajectories
    step, state = run.load_checkpoint() if student else (0, {})
    if student and not step:
        raise UserError(
            f"{run.folder} has no checkpoint yet; train it first with 'rapm train {run.folder}'"
        )
    teacher = teacher_of(config)
    family, settings = teacher.family, config.student
    # Another network's student would be drawn.
    check_facts(run.trajectories, {"teacher": teacher.fingerprint})
    network = teacher.load_network(config.torch_dtype, config.torch_device)
    backbone = Backbone(network, family.call, family.lora_targets)
    if student:
        targets = settings.targets or family.lora_targets
        backbone.add_adapter(STUDENT, settings.rank, targets, 0)
        backbone.load(STUDENT, learnt_weights(under_prefix(STUDENT, state)))
    return Sampler(
        teacher,
        backbone,
        guidance_scale=own.guidance_scale,
        negative_prompt=own.negative_prompt,
        size=own.sizes()[0],
        batch_size=own.batch_size,  # what the rollout fits in, pictures fit in
    )


def sample_run(
    run: Run,
    *,
    prompts: Sequence[str] = (),
    seed: int = 0,
    steps: int | None = None,
    few_steps: int | None = None,
    many_steps: int = 100,
    count: int = 8,
    file: Path | None = None,
) -> Path:
    """Draws an image grid from the same seeds: teacher at many steps, at few steps, student.

    A run may be training meanwhile; one that has no checkpoint yet gives the teacher's two rows.

    Args:
        prompts: taken in turn; none gives captions that the teacher brings but was not trained on,
            or the first of the run's own prompts.
        steps: the student's; N when left out.
        few_steps: the teacher's in the second row; as many as the student's when left out.
        count: pictures a row.
        file: where to; ``samples/`` in the run when left out.
    """
    steps = steps or run.config.trajectories.slots
    few_steps = few_steps or steps
    iteration, iterations = max(run.checkpoint_steps(), default=0), run.config.training.iterations
    with within_memory(run.config, "pictures"):
        sampler = open_sampler(run, student=iteration > 0)
    texts = list(prompts) or _own_prompts(run, sampler.teacher, count)
    texts = [texts[i % len(texts)] for i in range(count)]
    scale = sampler.guidance_scale
    calls = 1 if scale == 1 else 2
    rows = [
        (f"teacher, {n} steps, guidance {scale:g} ({calls * n} network calls)", TEACHER, n)
        for n in (many_steps, few_steps)
    ]
    name = f"seed-{seed}-steps-{steps}"
    if iteration < iterations:
        name += f"-iteration-{iteration}"
    if iteration:
        so_far = "" if iteration == iterations else f", iteration {iteration:,} of {iterations:,}"
        student = f"student, {steps} steps, no guidance ({steps} network calls){so_far}"
        rows.append((student, STUDENT, steps))
    file = file or run.samples / f"{name}.png"
    seeds = range(seed, seed + count)
    with within_memory(run.config, "pictures"):
        drawn = [(title, sampler.images(adapter, texts, seeds, n)) for title, adapter, n in rows]
    image_grid([(title, to_pictures(images, 128)) for title, images in drawn], file)
    return file


def _own_prompts(run: Run, teacher: Teacher, count: int) -> list[str]:
    own = run.config.trajectories.prompts
    if not own and teacher.captions:
        return teacher.captions(count, 1, "validation")
    # The store's, as the file may be gone.
    prompts = stored_prompts(run.trajectories) or read_prompts(own).prompts
    return [prompt.text for prompt in prompts]

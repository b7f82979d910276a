"""Few-step sampling from a teacher or a student."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapm.config import Config
from rapm.errors import UserError
from rapm.io import under_prefix
from rapm.memory import within_memory
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher, load_backbone, move
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.optim import learnt_weights
from rapm.pictures import FEW_STEP_GUIDANCE, facts_of_picture, image_grid, to_pictures
from rapm.progress import track
from rapm.prompts import read_prompts
from rapm.run import Run
from rapm.sampling import Conditioning, SchedulerName, guided, picture_noise, sample
from rapm.trajectories import check_facts, stored_prompts

MANY_STEPS, PICTURES = 100, 8


class Sampler:
    """A teacher and, if there is one, its student, to draw pictures with.

    Text encoders and VAE are loaded when the first prompt or picture asks for them; the encoders
    are on the GPU only while they encode.

    Args:
        backbone: the teacher's network; with a student's adapter or without.
        guidance_scale: the teacher's.
        size: of the pictures, (width, height) in pixels; None is the teacher's own.
        batch_size: pictures sampled side by side.
        scheduler: see :func:`rapm.sampling.sample`.
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
        scheduler: SchedulerName = "ddim",
    ) -> None:
        self.teacher, self.backbone, self.guidance_scale = teacher, backbone, guidance_scale
        self.negative_prompt, self.batch_size = negative_prompt, batch_size
        self.scheduler: SchedulerName = scheduler
        self.size, self.shape = size, teacher.latent_shape(size)
        self._on_step: Callable[[], object] = lambda: None

    @property
    def student_guidance(self) -> float:
        """What a student is drawn at."""
        return self.teacher.student_guidance(self.guidance_scale)

    @cached_property
    def _texts(self) -> Any:
        return self.teacher.load(self.teacher.family.text_parts, self.backbone.dtype, "cpu")

    @cached_property
    def _vae(self) -> Any:
        half = self.backbone.dtype == torch.float16  # where SDXL's VAE overflows
        dtype = torch.float32 if half else self.backbone.dtype
        return self.teacher.load(["vae"], dtype, str(self.backbone.device))

    def encode(
        self, prompts: Sequence[str], guidance_scale: float | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Conditioning of the prompts, [n, ...], and of the negative prompt, [1, ...].

        Text encoders take the network's turn on a GPU: together they may not fit.
        """
        network, device, family = self.backbone.network, self.backbone.device, self.teacher.family
        network.to("cpu")
        texts = move(self._texts, device)
        own = self.teacher.of_picture(self.size, guidance_scale or self.guidance_scale)
        own = {name: x.expand(len(prompts), *x.shape[1:]) for name, x in own.items()}
        try:
            unconditional = family.unconditional(texts, self.negative_prompt)
            return family.encode(texts, prompts) | own, unconditional
        finally:
            move(texts, "cpu")
            network.to(device)

    @contextmanager
    def watched(self, title: str, num_steps: int) -> Iterator[None]:
        """A bar over the network's steps meanwhile, each of one batch."""
        before = self._on_step
        with track(None, title, total=num_steps) as bar:
            self._on_step = bar.update
            try:
                yield
            finally:
                self._on_step = before

    @torch.no_grad()
    def latents(
        self,
        adapter: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Latents [n, C, h, w] of prompt i from the noise of seed i.

        Args:
            adapter: TEACHER or STUDENT.
            guidance_scale: instead of the teacher's own, or of what its student is drawn at.
        """
        side_by_side, seeds = batch_size or self.batch_size, list(seeds)
        z = torch.stack([picture_noise(seed, self.shape) for seed in seeds])
        own = self.guidance_scale if adapter == TEACHER else self.student_guidance
        scale = guidance_scale or own
        conditioning, unconditional = self.encode(prompts, scale)
        denoiser, schedule = guided(self.backbone, unconditional, scale), self.teacher.schedule

        def told(z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            prediction = denoiser(z, t, conditioning)
            self._on_step()
            return prediction

        done = []
        with self.backbone.adapter(adapter):
            for start in range(0, len(z), side_by_side):
                rows = slice(start, start + side_by_side)
                own = {name: value[rows] for name, value in conditioning.items()}
                noise = z[rows].to(self.backbone.device)
                walk = noise, own, num_steps, self.scheduler, seeds[rows]
                done.append(sample(told, schedule, *walk))
        return torch.cat(done)

    def images(
        self,
        adapter: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Pictures, float32 [n, 3, H, W] in [-1, 1], on the CPU."""
        latents = self.latents(adapter, prompts, seeds, num_steps, batch_size, guidance_scale)
        return self.teacher.family.decode(self._vae, latents)


def open_sampler(run: Run, *, student: bool = True, step: int | None = None) -> Sampler:
    """Loads what a run's pictures take: its teacher's network and, unless told not to, its student.

    Args:
        step: of the student's checkpoint; the newest when left out.

    Raises:
        UserError: the run's teacher is gone or another than it was, or the run has no checkpoint.
    """
    config = run.config
    step, state = run.load_checkpoint(step) if student else (0, {})
    if student and not step:
        raise UserError(
            f"{run.folder} has no checkpoint yet; train it first with 'rapm train {run.folder}'"
        )
    teacher, settings = teacher_of(config), config.student
    # Another network's student would be drawn.
    check_facts(run.trajectories, {"teacher": teacher.fingerprint})
    sampler = teachers_sampler(teacher, config)
    if student:
        backbone, targets = sampler.backbone, settings.targets or teacher.family.lora_targets
        backbone.add_adapter(STUDENT, settings.rank, targets, 0)
        backbone.load(STUDENT, learnt_weights(under_prefix(STUDENT, state)))
    return sampler


def teachers_sampler(
    teacher: Teacher, config: Config, scheduler: SchedulerName = "ddim"
) -> Sampler:
    """Loads a teacher's network, to draw as a run's settings say."""
    own = config.trajectories
    return Sampler(
        teacher,
        load_backbone(teacher, config, config.torch_device),
        guidance_scale=own.guidance_scale,
        negative_prompt=own.negative_prompt,
        size=own.sizes()[0],
        batch_size=own.batch_size,  # what the rollout fits in, pictures fit in
        scheduler=scheduler,
    )


def sample_run(
    run: Run,
    *,
    prompts: Sequence[str] = (),
    seed: int = 0,
    steps: int | None = None,
    few_steps: int | None = None,
    many_steps: int = MANY_STEPS,
    count: int = PICTURES,
    file: Path | None = None,
) -> Path:
    """Draws an image grid from the same seeds: teacher at many steps, at few steps, student.

    A run may be training meanwhile; one that has no checkpoint yet gives the teacher's two rows.
    At few steps high guidance breaks pictures, so the teacher is shown there at 3 at most. What is
    drawn already is not drawn again.

    Args:
        prompts: taken in turn; none gives captions that the teacher brings but was not trained on,
            or the first of the run's own prompts.
        steps: the student's; N when left out.
        few_steps: the teacher's in the second row; as many as the student's when left out.
        count: pictures a row.
        file: where to; when left out, in the run's ``samples/``, named by prompts and seed.

    Raises:
        UserError: ``file`` is there and shows something else, or as :func:`open_sampler`.
    """
    config = run.config
    steps, scale = steps or config.trajectories.slots, config.trajectories.guidance_scale
    few_steps = few_steps or steps
    # A run that trains may write another one meanwhile: this one is named, and drawn.
    (iteration, checkpoint), iterations = run.newest_checkpoint(), config.training.iterations
    teacher = teacher_of(config)
    texts = list(prompts) or _own_prompts(run, teacher, count)
    texts = [texts[i % len(texts)] for i in range(count)]
    rows = [("teacher", TEACHER, many_steps, scale)]
    rows += [("teacher", TEACHER, few_steps, min(scale, FEW_STEP_GUIDANCE))]
    told_student = teacher.student_guidance(scale)
    rows += [("student", STUDENT, steps, told_student)] if iteration else []
    facts = {
        "prompts": texts,
        "seed": seed,
        "rows": [list(row) for row in rows],
        "teacher": [teacher.fingerprint, config.trajectories.negative_prompt],
        "size": config.trajectories.size,
        "precision": config.precisions,
        "checkpoint": checkpoint,
    }
    name = _slug(prompts) + f"seed-{seed}-steps-{steps}"
    if iteration < iterations:
        name += f"-iteration-{iteration}"
    if file and file.exists() and facts_of_picture(file) != facts:
        raise UserError(f"--file {file} is there already and shows something else; name another")
    names = (f"{name}-{k}.png" if k > 1 else f"{name}.png" for k in itertools.count(1))
    free = (run.samples / n for n in names)
    file = file or next(f for f in free if not f.exists() or facts_of_picture(f) == facts)
    if file.exists():
        return file
    with within_memory(config, "pictures"):
        sampler = open_sampler(run, student=iteration > 0, step=iteration)
        batches, drawn = -(-count // sampler.batch_size), []
        with sampler.watched("pictures", batches * sum(n for _, _, n, _ in rows)):
            for model, adapter, n, guidance in rows:
                seeds = range(seed, seed + count)
                images = sampler.images(adapter, texts, seeds, n, guidance_scale=guidance)
                told = "no guidance" if guidance == 1 else f"guidance {guidance:g}"
                one_pass = guidance == 1 or teacher.family.guidance_is_input
                calls = n * (1 if one_pass else 2)
                title = f"{model}, {n} steps, {told} ({calls} network calls)"
                if adapter == STUDENT and iteration < iterations:
                    title += f", iteration {iteration:,} of {iterations:,}"
                drawn.append((title, to_pictures(images, 128)))
    image_grid(drawn, file, captions=texts, facts=facts)
    return file


def _slug(prompts: Sequence[str]) -> str:
    """The beginning of a file's name that says what was asked for."""
    if not prompts:
        return ""
    words = re.sub("[^a-z0-9]+", "-", prompts[0].lower())[:40].strip("-") or "prompt"
    return f"{words}-and-{len(prompts) - 1}-more-" if len(prompts) > 1 else f"{words}-"


def _own_prompts(run: Run, teacher: Teacher, count: int) -> list[str]:
    own = run.config.trajectories.prompts
    if not own and teacher.captions:
        return teacher.captions(count, 1, "validation")
    # The store's, as the file may be gone.
    prompts = stored_prompts(run.trajectories) or read_prompts(own).prompts
    return [prompt.text for prompt in prompts]

"""Scores of a run: of its student while it trains, and of what it came to; and of others' LoRAs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from rapm.config import Config
from rapm.errors import UserError
from rapm.evaluate import protocols, toy
from rapm.evaluate.drawing import Gallery, Model, Samplers
from rapm.evaluate.features import Reader
from rapm.evaluate.protocols import Choices
from rapm.evaluate.rows import Scores
from rapm.io import sha256
from rapm.memory import within_memory
from rapm.methods import Method
from rapm.models.lora import find_lora
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER
from rapm.run import Run
from rapm.sample import Sampler, open_sampler, teachers_sampler
from rapm.sampling import SchedulerName
from rapm.trajectories import stored_prompts
from rapm.versions import versions


def quick_scores(run: Run, teacher: Teacher, method: Method) -> Callable[[], dict[str, float]]:
    """What scores the student as it stands.

    Raises:
        UserError: nothing can score this teacher's students while they train.
    """
    if teacher.captions is None:
        raise UserError(
            "evaluate.every: only the toy teacher's students are scored while they train; what "
            "others' pictures show is measured at every time of samples"
        )
    own = run.config.trajectories
    sampler = Sampler(
        teacher, method.backbone, guidance_scale=own.guidance_scale, batch_size=own.batch_size
    )

    def scores() -> dict[str, float]:
        with method.student.averaged():
            return toy.quick(sampler, "validation", own.slots)

    return scores


# ---- files


def scores_file(run: Run, protocol: str) -> Path:
    """Where a run keeps its scores by a protocol, ``toy-validation`` being one of its own."""
    return run.folder / f"scores-{protocol}.json"


def scores_of(run: Run) -> list[Scores]:
    """All scores of the run's newest checkpoint."""
    made = {"checkpoint": run.newest_checkpoint()[1]}
    files = sorted(run.folder.glob("scores-*.json"))
    return [scores for file in files if (scores := Scores.load(file, made))]


def _how() -> dict[str, Any]:
    command = " ".join(["rapm", *sys.argv[1:]])
    return {"command": command, "versions": versions(), "threads": torch.get_num_threads()}


# ---- the toy data set


def evaluate_toy(run: Run, split: Literal["test", "validation"] = "test") -> tuple[list[str], bool]:
    """Scores a run of the toy teacher by its oracle; once for a checkpoint.

    Returns:
        Tables of scores and thresholds, and whether the student reaches all of these.

    Raises:
        UserError: it is another teacher's.
    """
    if teacher_of(run.config).captions is None:
        raise UserError("protocol toy is the toy teacher's, whose oracle reads its own data set")
    file = scores_file(run, "toy" if split == "test" else f"toy-{split}")
    step, checkpoint = run.newest_checkpoint()
    made = {"checkpoint": checkpoint, "method": run.config.method}
    scores = Scores.load(file, made)
    if scores is None:
        rows = toy.score(open_sampler(run, step=step or None), split, run.config.trajectories.slots)
        told = {"name": "toy" if split == "test" else f"toy {split}", "captions": split}
        told |= {"count": rows[-1].images, "pairs_for_diversity": toy.PAIRS}
        scores = Scores(told | {"reference": f"the teacher's {toy.MANY_STEPS} steps"}, rows)
        scores.save(file, made | _how())
    thresholds, reached = toy.against_thresholds(scores.rows, run.config.method)
    return [*scores.render(), "", *thresholds, "", f"Scores: {file}"], reached


# ---- by published networks


def evaluate_run(
    run: Run,
    choices: Choices,
    *,
    weights: Path,
    cache: Path,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: SchedulerName = "ddim",
) -> list[str]:
    """Scores a run's student, and its teacher beside it; writes ``scores-PROTOCOL.json``.

    Args:
        weights: the folder of the networks that read pictures, see
            :class:`rapm.evaluate.features.Reader`.
        cache: where what they read is kept, for all runs.
        steps: the student's; N when left out.
        guidance_scale: the student's; what it was trained for when left out.

    Returns:
        A table in lines.

    Usage::

        choices = Choices("teacher", count=500)
        evaluate_run(run, choices, weights=Path("weights"), cache=Path("cache"))
    """
    step, checkpoint = run.newest_checkpoint()
    if not step:
        raise UserError(f"{run.folder} has no checkpoint yet, so there is nothing to score")

    def student() -> Sampler:
        sampler = open_sampler(run, step=step)
        sampler.scheduler = scheduler
        return sampler

    return _evaluate(
        run.config,
        choices,
        student,
        ("student", STUDENT, STUDENT),
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        weights=weights,
        cache=cache,
        file=scores_file(run, choices.name),
        made={"checkpoint": checkpoint, "method": run.config.method},
        trained_on=[prompt.text for prompt in stored_prompts(run.trajectories)],
    )


def evaluate_lora(
    lora: Path,
    config: Config,
    choices: Choices,
    *,
    weights: Path,
    cache: Path,
    file: Path,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: SchedulerName = "ddim",
) -> list[str]:
    """Scores a LoRA that was made elsewhere, at strength 1.0 on the teacher of ``config``. As
    :func:`evaluate_run`; scores go to ``file``.

    Raises:
        UserError: ``file`` cannot be written, or holds something else than scores.
    """
    if file.suffix.lower() != ".json" or not Scores.may_replace(file):
        raise UserError(f"--out {file}: scores are JSON, and replace nothing but scores")
    if len(config.trajectories.sizes()) > 1:
        raise UserError("pictures of one size are scored; name one with --size")
    found, teacher = find_lora(f"{lora}:1", pickles=True), teacher_of(config)
    fused = replace(teacher, loras=(*teacher.loras, found))
    return _evaluate(
        config,
        choices,
        lambda: teachers_sampler(fused, config, scheduler),
        (lora.stem, "lora", TEACHER),
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        weights=weights,
        cache=cache,
        file=file,
        made={"checkpoint": sha256(found.file)},
        trained_on=(),
    )


def _evaluate(
    config: Config,
    choices: Choices,
    student: Callable[[], Sampler],
    drawn: tuple[str, str, str],
    *,
    steps: int | None,
    guidance_scale: float | None,
    scheduler: SchedulerName,
    weights: Path,
    cache: Path,
    file: Path,
    made: Mapping[str, Any],
    trained_on: Any,
) -> list[str]:
    """Scores a model by a protocol, once.

    Args:
        drawn: name, source and adapter of what ``student`` draws with.
    """
    teacher, own = teacher_of(config), config.trajectories
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written: no such folder, or no permission")
    task = protocols.open_task(choices, teacher, trained_on)
    with within_memory(config, "pictures"):
        reader = Reader(weights, config.torch_device, choices.prefix)
    width, height = own.sizes()[0] or teacher.size()
    facts = {
        "teacher": teacher.fingerprint,
        "negative_prompt": own.negative_prompt,
        "size": f"{width}x{height}",
        "precision": config.precisions,
    }
    name, source, adapter = drawn
    steps, told = steps or own.slots, facts | {"weights": made["checkpoint"], "by": scheduler}
    scale = guidance_scale or teacher.student_guidance(own.guidance_scale)
    name += "" if scheduler == "ddim" else f", {scheduler}"
    models = [Model(name, source, adapter, steps, scale, told)]
    if choices.with_teacher or choices.name == "teacher":
        each = own.guidance_scale, choices.many_steps, steps
        models = [*protocols.teacher_models(facts, *each), *models]
    protocol = task.facts(reader.marks) | {"size": facts["size"]}
    if choices.name == "teacher":
        protocol |= {"teacher": teacher.fingerprint[:12], "guidance": own.guidance_scale}
        protocol |= {"negative_prompt": own.negative_prompt or "none"}
    asked = {**made, "drawn": [[m.name, m.steps, m.guidance_scale, m.facts] for m in models]}
    scores = Scores.load(file, asked)
    if scores is None or scores.protocol != protocol:
        samplers = Samplers({TEACHER: lambda: teachers_sampler(teacher, config), source: student})
        with within_memory(config, "pictures"):
            gallery = Gallery(reader, choices.resize, cache)
            rows, notes = protocols.score(task, models, samplers, gallery)
        is_sdxl = teacher.family.base_model(teacher.config)[0].startswith("sdxl")
        notes += [protocols.REPORTED] * (choices.name == "coco" and is_sdxl)
        scores = Scores(protocol, rows, notes)
        scores.save(file, asked | _how())
    return [*scores.render(), f"Scores: {file}"]

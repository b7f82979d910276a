"""The stages of a distillation, which the command line calls. Trajectories and training are skipped
when they are done."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from rapm import config as configuration
from rapm.config import Config
from rapm.errors import UserError
from rapm.evaluate import toy as toy_protocol
from rapm.export import export_run
from rapm.io import write_json
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher, load_backbone, move
from rapm.network import STUDENT, TEACHER
from rapm.objective import Conditioning
from rapm.prompts import Prompt, PromptList, count_longer, read_prompts, report, token_limit
from rapm.run import Run
from rapm.sample import open_studio, sheet
from rapm.toy import scenes
from rapm.train import train
from rapm.trajectories import TrajectoryStore, check_facts, guided, make_store, stored_prompts
from rapm.versions import versions

Stage = Literal["trajectories", "training", "pictures"]


def _prompts(config: Config) -> PromptList:
    settings = config.trajectories
    if settings.prompts:
        return read_prompts(settings.prompts)
    if config.teacher != "toy":
        raise UserError(
            "trajectories.prompts names no file; give one with --prompts FILE ('rapm prompts --out "
            "prompts.txt' makes one)"
        )
    return PromptList(
        [Prompt(caption) for caption in scenes.captions(settings.count, settings.seed, "train")], 0
    )


def open_run(config: Config, out: Path) -> Run:
    """Creates a run or goes on with one, once all that its settings name is there: a mistake leaves
    no folder behind.

    Raises:
        UserError: no such teacher, prompts or device, or the folder holds something else.
    """
    teacher, prompts, _ = teacher_of(config), _prompts(config), config.torch_device
    for size in config.trajectories.sizes():
        teacher.latent_shape(size)
    # Before the run takes these settings over: its trajectories may be others'.
    check_facts(out / "trajectories", _facts(config, teacher, prompts), complete=True)
    return Run.open(out, config)


def describe_prompts(run: Run) -> str:
    """One line about a run's prompts: how many there are, were left out, and are longer than the
    teacher reads.

    Raises:
        UserError: the prompts or the teacher are not as they must be.
    """
    prompts, used = _prompts(run.config), run.config.trajectories.count
    tokenizers = teacher_of(run.config).load_tokenizers()
    limit = token_limit(tokenizers)
    longer = count_longer([prompt.text for prompt in prompts.prompts[:used]], tokenizers, limit)
    return report(prompts, used, longer, limit)


# ---- trajectories


def _facts(config: Config, teacher: Teacher, prompts: PromptList) -> dict[str, Any]:
    """All that trajectories depend on."""
    listed = json.dumps(
        [[prompt.text, prompt.seed] for prompt in prompts.prompts[: config.trajectories.count]]
    )
    return _facts_without_prompts(config, teacher) | {
        "prompts": hashlib.sha256(listed.encode()).hexdigest()
    }


def _facts_without_prompts(config: Config, teacher: Teacher) -> dict[str, Any]:
    settings = config.trajectories
    return {
        "teacher": teacher.fingerprint,
        "grid": [settings.slots, settings.fine_steps, settings.delta],
        "training.positions": config.training.positions,  # says which slots are rolled out
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "size": settings.size,
        "seed": settings.seed,
        "count": settings.count,
        "precision": config.precision
        if config.base_precision == "same"
        else f"{config.precision}, {config.base_precision}",
        "shard_size": settings.shard_size,
        "rapm": version("rapm"),
    }


@contextmanager
def _within_memory(config: Config, stage: Stage) -> Iterator[None]:
    """Tells what to change when memory does not suffice.

    Raises:
        UserError: it did not.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        free, others = save_memory(config, stage)
        raise UserError(
            f"memory does not suffice for {stage}; what is finished is kept. In order of effect: "
            f"{', '.join(free) or 'nothing'} (the run goes on); {', '.join(others)} (another "
            f"--out); each by --set of "
            "'rapm distill'"
        ) from None


def save_memory(config: Config, stage: Stage) -> tuple[list[str], list[str]]:
    """Settings that would lower a stage's memory, the most effective first: those a run can go on
    with, and the others."""
    training, rank = config.training, config.student.rank
    in_training, whole = stage == "training", config.precision == "float32"
    held = stage != "pictures"  # those are drawn on the whole network
    free = {
        "training.gradient_checkpointing=true": in_training and not training.gradient_checkpointing,
        "training.slot_batch=1": in_training and training.slot_batch > 1,
        "trajectories.batch_size=1": not in_training and config.trajectories.batch_size > 1,
    }
    others = {
        "precision=bfloat16": whole,
        "training.walk_ahead=1": in_training and training.walk_ahead > 1,
        "training.batch_size=1": in_training and training.batch_size > 1,
        "base_precision=int8": held and config.base_precision == "same",
        "base_precision=nf4": held and config.base_precision != "nf4",
        "training.optimizer=adamw8bit": in_training and training.optimizer == "adamw",
        f"student.rank={rank // 2}": in_training and rank > 1,
        "a smaller trajectories.size": True,
    }
    return [name for name, helps in free.items() if helps], [
        name for name, helps in others.items() if helps
    ]


def make_trajectories(run: Run) -> TrajectoryStore:
    """Rolls out the teacher for every prompt and seed, or goes on with it, or opens what is there.

    Raises:
        UserError: the prompts, the teacher or an existing store are not as they must be, or memory
            does not suffice.
    """
    config, settings = run.config, run.config.trajectories
    teacher = teacher_of(config)
    listed = _prompts(config)
    prompts = listed.prompts[
        : settings.count
    ]  # no trajectory has one of the others, and encoding them takes memory
    facts = _facts(config, teacher, listed)
    if check_facts(run.trajectories, facts, complete=True):
        return TrajectoryStore.open(run.trajectories)
    device, family = config.torch_device, teacher.family
    sizes = [
        (teacher.latent_shape(size), family.of_size(*(size or teacher.size())))
        for size in settings.sizes()
    ]
    with _within_memory(config, "trajectories"):
        conditioning, unconditional = _encode(teacher, prompts, config)
        backbone = load_backbone(teacher, config, device)
    for targets in (config.student.targets, config.critics.targets):
        backbone.check_targets(targets)  # now, and not after hours of rollout
    with _within_memory(config, "trajectories"), backbone.role(TEACHER):
        return make_store(
            run.trajectories,
            guided(backbone, unconditional, settings.guidance_scale),
            teacher.schedule,
            config.grid(),
            slots=config.rolled_slots,
            prompts=prompts,
            conditioning=conditioning,
            unconditional=unconditional,
            sizes=sizes,
            count=settings.count,
            seed=settings.seed,
            batch_size=settings.batch_size,
            shard_size=settings.shard_size,
            facts=facts,
            device=device,
        )


def _encode(
    teacher: Teacher, prompts: Sequence[Prompt], config: Config
) -> tuple[Conditioning, Conditioning]:
    """Of the prompts and of the negative prompt. The text encoders are gone when this returns: the
    rollout has the GPU."""
    texts = teacher.load(teacher.family.text_parts, config.torch_dtype, config.torch_device)
    negative = config.trajectories.negative_prompt
    encoded = (
        teacher.family.encode(texts, [prompt.text for prompt in prompts]),
        teacher.family.unconditional(texts, negative),
    )
    move(texts, "cpu")
    return encoded


# ---- training


def train_run(run: Run) -> bool:
    """Trains the student to the run's last iteration. Returns False when the user stopped it.

    Raises:
        UserError: there are no trajectories, they are another teacher's, memory does not suffice,
            or training cannot go on.
    """
    if run.checkpoint_steps()[-1:] == [run.config.training.iterations]:
        return True
    teacher = teacher_of(run.config)
    check_facts(run.trajectories, _facts_without_prompts(run.config, teacher))
    store = TrajectoryStore.open(run.trajectories)
    with _within_memory(run.config, "training"):
        return train(
            run,
            load_backbone(teacher, run.config, run.config.torch_device),
            store,
            teacher.schedule,
        )


# ---- results


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
    """Draws a sheet from the same seeds: the teacher at many steps, the teacher at few steps, the
    student of the newest checkpoint. A run may be training meanwhile; one that has no checkpoint
    yet gives the teacher's two rows.

    Args:
        prompts: taken in turn; none gives held-out captions of the toy world, or the first of the
            run's own prompts.
        steps: the student's; N when left out.
        few_steps: the teacher's in the second row; as many as the student's when left out.
        count: pictures a row.
        file: where to; ``samples/`` in the run when left out.
    """
    steps = steps or run.config.trajectories.slots
    few_steps = few_steps or steps
    iteration, iterations = max(run.checkpoint_steps(), default=0), run.config.training.iterations
    with _within_memory(run.config, "pictures"):
        studio = open_studio(run, student=iteration > 0)
    if not prompts:
        if run.config.teacher == "toy" and not run.config.trajectories.prompts:
            prompts = scenes.captions(count, 1, "validation")
        else:  # the store's, as the file may be gone
            own = stored_prompts(run.trajectories) or _prompts(run.config).prompts
            prompts = [prompt.text for prompt in own]
    texts = [prompts[i % len(prompts)] for i in range(count)]
    seeds = range(seed, seed + count)
    scale = studio.guidance_scale
    calls = 1 if scale == 1 else 2
    name, so_far = f"seed-{seed}-steps-{steps}", ""
    if iteration < iterations:  # each look at a run that learns is kept
        name, so_far = (
            f"{name}-iteration-{iteration}",
            f", after {iteration:,} of {iterations:,} iterations",
        )
    rows = [
        (
            f"teacher, {many_steps} steps, guidance {scale:g} ({calls * many_steps} network calls)",
            TEACHER,
            many_steps,
        ),
        (
            f"teacher, {few_steps} steps, guidance {scale:g} ({calls * few_steps} network calls)",
            TEACHER,
            few_steps,
        ),
    ]
    if iteration:
        rows.append(
            (f"student, {steps} steps, no guidance ({steps} network calls){so_far}", STUDENT, steps)
        )
    file = file or run.samples / f"{name}.png"
    with _within_memory(run.config, "pictures"):
        images = [(title, studio.images(role, texts, seeds, n)) for title, role, n in rows]
    sheet(images, file)
    return file


def evaluate_run(
    run: Run, split: scenes.Split = "test"
) -> tuple[list[toy_protocol.Row], list[str]]:
    """Scores a run of the toy world and writes ``scores.json``. Returns the rows and the bars
    missed, in words."""
    if run.config.teacher != "toy":
        raise UserError("only the toy teacher has an oracle to be scored with, as yet")
    rows = toy_protocol.score(open_studio(run), split, run.config.trajectories.slots)
    scores = {
        "rows": toy_protocol.as_dicts(rows),
        "split": split,
        "command": " ".join(["rapm", *sys.argv[1:]]),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    write_json(run.scores if split == "test" else run.folder / f"scores-{split}.json", scores)
    return rows, toy_protocol.missed_bars(rows)


def distill(
    teacher: str = "toy",
    out: str | Path = "runs/distilled",
    *,
    teacher_config: str | Path | None = None,
    teacher_loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    size: str | None = None,
    config: str | Path | None = None,
    preset: str | None = None,
    settings: Sequence[str] = (),
) -> Run | None:
    """The whole chain: trajectories, training, export, a sheet of pictures. Call it again to go on
    where it stopped.

    Args:
        teacher: see :func:`rapm.models.resolve.resolve_teacher`, and there for ``teacher_config`` and
            ``teacher_loras``.
        out: the run's folder.
        prompts: a file, or ``hub:OWNER/NAME``, see :func:`rapm.prompts.read_prompts`; the toy
            teacher can do without.
        size: of the pictures, WIDTHxHEIGHT; several with commas between.
        config: TOML file.
        preset: a shipped configuration.
        settings: ``section.key=value`` each.

    Returns:
        The run; None when the user stopped it half-way.

    Raises:
        UserError: something given is wrong; nothing that was written before is lost.
    """
    chosen = configuration.load(
        Path(config) if config else None,
        preset=preset,
        teacher=teacher,
        teacher_config=Path(teacher_config) if teacher_config else None,
        teacher_loras=teacher_loras,
        prompts=prompts,
        size=size,
        settings=settings,
    )
    return distill_config(chosen, Path(out))


def distill_config(config: Config, out: Path) -> Run | None:
    """:func:`distill` with its settings already put together."""
    run = open_run(config, out)
    return run if distill_run(run) else None


def distill_run(run: Run) -> bool:
    """:func:`distill` with its run already open. Returns False when the user stopped it."""
    with run.locked():
        make_trajectories(run)
        if not train_run(run):
            return False
        export_run(run)
        sample_run(run)
    return True

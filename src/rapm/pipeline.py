"""The stages of a distillation, in order: prompts, trajectories, training, export, pictures.

Each is skipped when its result is there and matches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapm import settings
from rapm.config import Config
from rapm.errors import UserError
from rapm.export import export_run
from rapm.memory import within_memory
from rapm.methods import METHODS
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher, load_backbone, move
from rapm.network import TEACHER
from rapm.pictures import decode
from rapm.presets import check_preset
from rapm.prompts import Prompt, PromptList, count_longer, read_prompts, report, token_limit
from rapm.quiet import quiet_libraries
from rapm.report import write_report
from rapm.rollout import Contents, make_store, merge, rollout
from rapm.run import Run
from rapm.sample import sample_run
from rapm.samples import TrainingSamples
from rapm.sampling import Conditioning, guided
from rapm.scores import quick_scores
from rapm.trackers import check_tracker, open_tracker
from rapm.train import train
from rapm.trajectories import TrajectoryStore, check_facts
from rapm.watch import Watch


def distill(
    teacher: str | None = None,
    out: str | Path = "runs/distilled",
    *,
    method: str | None = None,
    teacher_config: str | Path | None = None,
    teacher_loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    size: str | None = None,
    config: str | Path | None = None,
    preset: str | None = None,
    set: Sequence[str] = (),
    tracker: str = "",
) -> Run | None:
    """The whole chain. Call it again to go on where it stopped.

    Args:
        teacher: see :func:`rapm.models.resolve.resolve_teacher`, and there for ``teacher_config``
            and ``teacher_loras``; the settings' when left out.
        out: the run's folder.
        method: "rapm" or "midpoint".
        prompts: a file, or ``hub:OWNER/NAME``, see :func:`rapm.prompts.read_prompts`; the toy
            teacher can do without.
        size: of the pictures, WIDTHxHEIGHT; several with commas between.
        config: TOML file.
        preset: a shipped configuration.
        set: ``section.key=value`` each.
        tracker: "tensorboard" or "wandb", to show the run in besides its own page.

    Returns:
        The run; None when the user stopped it half-way.

    Raises:
        UserError: something given is wrong; nothing that was written before is lost.

    Usage::

        run = rapm.distill("model.safetensors", "runs/mine", prompts="prompts.txt")
    """
    chosen = settings.load(
        Path(config) if config else None,
        method=method,
        preset=preset,
        teacher=teacher,
        teacher_config=Path(teacher_config) if teacher_config else None,
        teacher_loras=teacher_loras,
        prompts=prompts,
        size=size,
        settings=set,
    )
    with quiet_libraries():
        run = open_run(chosen, Path(out), preset)
        return run if distill_run(run, tracker) else None


def distill_run(run: Run, tracker: str = "") -> bool:
    """:func:`distill` with its run already open. Returns False when the user stopped it."""
    check_tracker(tracker)
    with run.locked():
        make_trajectories(run)
        if not train_run(run, tracker):
            return False
        export_run(run)
        sample_run(run)
        write_report([run], run.page)
    return True


def open_run(config: Config, out: Path, preset: str | None = None, patience: float = 0) -> Run:
    """Creates a run or goes on with one, once all that its settings name is there.

    Args:
        patience: seconds to wait for another process that works on it.

    Raises:
        UserError: no such teacher, prompts or device, a preset of another family, or the folder
            holds something else. A mistake leaves no folder behind.
    """
    teacher = teacher_of(config)
    if preset:
        check_preset(preset, teacher)
    prompts, _ = _prompts(config, teacher), config.torch_device
    for size in config.trajectories.sizes():
        teacher.latent_shape(size)
    # Before the run takes these settings over: its trajectories may be others'.
    Run.check_method(out, config)
    check_facts(out / "trajectories", _facts(config, teacher, prompts), complete=True)
    return Run.open(out, config, patience=patience)


# ---- prompts


def _prompts(config: Config, teacher: Teacher) -> PromptList:
    own = config.trajectories
    if own.prompts:
        return read_prompts(own.prompts)
    if teacher.captions is None:
        raise UserError(
            "trajectories.prompts names no file; give one with --prompts FILE "
            "('rapm prompts --out prompts.txt' makes one)"
        )
    return PromptList([Prompt(c) for c in teacher.captions(own.count, own.seed, "train")], 0)


def describe_prompts(run: Run) -> str:
    """One line about a run's prompts: how many there are, and are longer than the teacher reads."""
    teacher = teacher_of(run.config)
    prompts, used = _prompts(run.config, teacher), run.config.trajectories.count
    texts, tokenizers = [p.text for p in prompts.prompts[:used]], teacher.load_tokenizers()
    return report(prompts, used, count_longer(texts, tokenizers), token_limit(tokenizers))


# ---- trajectories


def facts_of(config: Config) -> dict[str, Any]:
    """All that a run's trajectories depend on, as JSON: equal facts, equal trajectories."""
    teacher = teacher_of(config)
    return _facts(config, teacher, _prompts(config, teacher))


def _facts(config: Config, teacher: Teacher, prompts: PromptList) -> dict[str, Any]:
    used = prompts.prompts[: config.trajectories.count]
    listed = json.dumps([[prompt.text, prompt.seed] for prompt in used])
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return _facts_without_prompts(config, teacher) | {"prompts": digest}


def _facts_without_prompts(config: Config, teacher: Teacher) -> dict[str, Any]:
    own, grid = config.trajectories, config.grid()
    facts = {name: getattr(own, name) for name in ("negative_prompt", "size", "seed", "count")}
    if positions := METHODS[config.method].stores_positions:
        steps = [grid.slots, grid.fine_steps, grid.delta]
        facts |= {"grid": steps, "shard_size": own.shard_size}
    if positions or teacher.family.guidance_is_input:
        facts |= {"guidance_scale": own.guidance_scale}
    return facts | {
        "teacher": teacher.fingerprint,
        "precision": config.precisions,
        "rapm": version("rapm"),
    }


def make_trajectories(run: Run) -> TrajectoryStore:
    """Rolls out the teacher for every prompt and seed, or goes on with it, or opens what is there.

    Where the method needs no positions, prompts alone are encoded and stored. Other processes may
    do the same for the same run meanwhile. Raises as :func:`make_share` does.
    """
    store = make_share(run)
    assert store is not None, "all of it is its share"
    return store


def make_share(
    run: Run, share: tuple[int, int] = (0, 1), others: Sequence[Path] = ()
) -> TrajectoryStore | None:
    """Rolls out a share of a run's trajectories.

    Args:
        share: (i, n): of n parts the i-th, counted from 0.
        others: folders of runs whose finished shards are taken over first.

    Returns:
        The store, once all of it is there; None before.

    Raises:
        UserError: the prompts, the teacher or an existing store are not as they must be, or memory
            does not suffice.
    """
    config, own = run.config, run.config.trajectories
    teacher = teacher_of(config)
    listed = _prompts(config, teacher)
    facts = _facts(config, teacher, listed)
    if check_facts(run.trajectories, facts, complete=True):
        return TrajectoryStore.open(run.trajectories)
    for other in others:
        merge(run.trajectories, other / "trajectories", facts)
    # No trajectory has one of the other prompts, and encoding them takes memory.
    prompts = listed.prompts[: own.count]
    device = torch.device(config.torch_device)
    with within_memory(config, "trajectories"):
        # Now, and not when the first picture is drawn after hours.
        decode(teacher, torch.zeros(1, teacher.channels, 8, 8), config.torch_dtype, device)
        conditioning, unconditional = _encode(teacher, prompts, config)
        backbone = load_backbone(teacher, config, config.torch_device)
    contents = Contents(
        prompts=prompts,
        conditioning=conditioning,
        unconditional=unconditional,
        sizes=[
            (teacher.latent_shape(size), teacher.of_picture(size, own.guidance_scale))
            for size in own.sizes()
        ],
        count=own.count,
        seed=own.seed,
        shard_size=own.shard_size,
        facts=facts,
    )
    network = guided(backbone, unconditional, own.guidance_scale)

    def roll(z: Tensor, prompts: Conditioning) -> tuple[Tensor, Tensor]:
        z = z.to(backbone.device)
        return rollout(network, teacher.schedule, config.grid(), z, prompts)

    rolled = roll if METHODS[config.method].stores_positions else None
    with within_memory(config, "trajectories"), backbone.adapter(TEACHER):
        size, folder = own.batch_size, run.trajectories
        return make_store(folder, contents, rolled, batch_size=size, share=share)


def _encode(
    teacher: Teacher, prompts: Sequence[Prompt], config: Config
) -> tuple[Conditioning, Conditioning]:
    """Of the prompts and of the negative prompt, in the dtype that the network takes them in.

    Those of T5 are large. The text encoders are gone when this returns.
    """
    family, negative = teacher.family, config.trajectories.negative_prompt
    texts = teacher.load(family.text_parts, config.torch_dtype, config.torch_device)
    encoded = family.encode(texts, [p.text for p in prompts]), family.unconditional(texts, negative)
    move(texts, "cpu")
    kept, guided_from = ({n: x.to(config.torch_dtype) for n, x in own.items()} for own in encoded)
    return kept, guided_from


# ---- training


def train_run(run: Run, tracker: str = "") -> bool:
    """Trains the student to the run's last iteration. Returns False when the user stopped it.

    Args:
        tracker: see :func:`distill`.

    Raises:
        UserError: there are no trajectories, they are another teacher's, memory does not suffice,
            or training cannot go on.
    """
    config = run.config
    if run.checkpoint_steps()[-1:] == [config.training.iterations]:
        return True
    teacher = teacher_of(config)
    check_facts(run.trajectories, _facts_without_prompts(config, teacher))
    store = TrajectoryStore.open(run.trajectories)
    with within_memory(config, "training"):
        backbone = load_backbone(teacher, config, config.torch_device)
        method = METHODS[config.method](config, backbone, teacher.schedule, store)
        scores = quick_scores(run, teacher, method) if config.evaluate.every else None
        trackers = [open_tracker(tracker, run)] if tracker else []
        watch = Watch(run, TrainingSamples(run, teacher, method, store), scores, trackers)
        try:
            return train(run, method, store, watch)
        finally:
            for each in trackers:
                each.close()

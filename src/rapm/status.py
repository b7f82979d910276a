"""How far a run has got and what it made, in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapm.config import Config
from rapm.export import exported
from rapm.models.resolve import teacher_of
from rapm.run import Run
from rapm.trajectories import read_manifest


def loras_of(config: Config) -> list[str]:
    """A line for each LoRA that is fused into the teacher."""
    return [
        f"Fused into the teacher: {lora.file.name} at strength {lora.strength:g}"
        for lora in teacher_of(config).loras
    ]


def standing(run: Run) -> str:
    """What is finished of it and kept, such as "a checkpoint of iteration 400 of 20,000"."""
    steps, config = run.checkpoint_steps(), run.config
    if steps:
        return f"a checkpoint of iteration {steps[-1]:,} of {config.training.iterations:,}"
    if read_manifest(run.trajectories) is not None:
        return "all trajectories, no checkpoint yet"
    shards = len(list(run.trajectories.glob("shard-*.safetensors")))
    if shards:
        rolled = min(shards * config.trajectories.shard_size, config.trajectories.count)
        return f"{rolled:,} of {config.trajectories.count:,} trajectories, no checkpoint yet"
    return "its settings, no trajectories and no checkpoint yet"


def files_of(run: Run) -> list[str]:
    """A line for each LoRA, page and picture that the run has."""
    lines = []
    files = exported(run)
    if files.kohya.is_file():
        lines += [f"LoRA for diffusers: {files.diffusers}"]
        lines += [f"LoRA for ComfyUI, Forge and A1111: {files.kohya}"]
    elif files.diffusers.is_file():
        lines += [f"LoRA for diffusers and ComfyUI: {files.diffusers}"]
    if run.page.is_file():
        lines += [f"Page: {run.page}"]
    pictures = sorted(run.samples.glob("*.png"))
    # Rows of iterations.png, and what the page alone shows.
    rows = ("iteration-", "teacher", "trajectory-")
    return lines + [f"Picture: {p}" for p in pictures if not p.name.startswith(rows)]


@dataclass(frozen=True)
class Progress:
    """How far training is. ``done`` and ``total`` are iterations; ``gone`` and ``left`` hours."""

    done: int
    total: int
    gone: float
    left: float


def progress_of(config: Config, records: Sequence[Mapping[str, Any]]) -> Progress:
    """By the metrics of a run."""
    done, total = (records[-1]["iteration"] + 1 if records else 0), config.training.iterations
    gone = training_seconds(records) / 3600
    return Progress(done, total, gone, gone / done * (total - done) if done else 0.0)


def training_seconds(records: Iterable[Mapping[str, Any]]) -> float:
    """What iterations took, by their metrics: of each kind the median times its number.

    So neither a pause nor pictures between two iterations count, nor a clock that began again.
    """
    kinds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    before = 0.0
    for record in records:
        kinds[tuple(record)].append(record["seconds"] - before)
        before = record["seconds"]
    return sum(len(taken) * statistics.median_low(taken) for taken in kinds.values())

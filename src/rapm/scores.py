"""Scores of a run: of its student while it trains, and of what it came to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

import torch

from rapm.errors import UserError
from rapm.io import write_json
from rapm.methods import Method
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher
from rapm.run import Run
from rapm.sample import Sampler, open_sampler
from rapm.versions import versions


def quick_scores(run: Run, teacher: Teacher, method: Method) -> Callable[[], dict[str, float]]:
    """What scores the student as it stands.

    Raises:
        UserError: nothing can score this teacher's students.
    """
    from rapm.evaluate import toy

    if teacher.captions is None:
        raise UserError("evaluate.every: only the toy teacher has an oracle to be scored with")
    own = run.config.trajectories
    sampler = Sampler(
        teacher, method.backbone, guidance_scale=own.guidance_scale, batch_size=own.batch_size
    )

    def scores() -> dict[str, float]:
        with method.student.averaged():
            return toy.quick(sampler, "validation", own.slots)

    return scores


def evaluate_run(run: Run, split: Literal["test", "validation"] = "test") -> tuple[list[str], bool]:
    """Scores a run of the toy teacher and writes ``scores.json``; once for a checkpoint.

    Returns:
        Tables of scores and thresholds, and whether the student reaches all of these.
    """
    from rapm.evaluate import toy

    if teacher_of(run.config).captions is None:
        raise UserError("only the toy teacher has an oracle to be scored with, as yet")
    file = run.scores if split == "test" else run.folder / f"scores-{split}.json"
    step, checkpoint = run.newest_checkpoint()
    rows = toy.scored(file, checkpoint)
    if rows is None:
        rows = toy.score(open_sampler(run, step=step or None), split, run.config.trajectories.slots)
        scores = {
            "method": run.config.method,
            "rows": [asdict(row) for row in rows],
            "split": split,
            "checkpoint": checkpoint,
            "command": " ".join(["rapm", *sys.argv[1:]]),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        write_json(file, scores)
    thresholds, reached = toy.against_thresholds(rows, run.config.method)
    return [*toy.render(rows), "", *thresholds, "", f"Scores: {file}"], reached

"""The protocol of the embedded world: what is drawn, what is compared with what, and the bars a student must clear.

For each of 1,000 captions that neither teacher nor student was trained on, one picture from one seed; for the first 200 a
second picture from another seed, for diversity (to tune on: 300 and 100 validation captions). FID is to the teacher's 100-step
pictures of the same captions from a third seed, so no model meets its own noise there. What takes the teacher 100 steps is
shipped (``python -m rapm.toy.score`` wrote it); a few of its pictures are drawn again and compared, so that a stale reference
cannot go unseen.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rapm.errors import UserError
from rapm.evaluate.metrics import frechet_distance, pair_distance, sharpness
from rapm.files import load_tensors
from rapm.network import STUDENT, TEACHER
from rapm.progress import track
from rapm.sample import Studio
from rapm.toy import ASSETS, GUIDANCE_SCALE, ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import Split, captions

CAPTIONS: dict[Split, int] = {"test": 1000, "validation": 300}
PAIRS: dict[Split, int] = {"test": 200, "validation": 100}  # captions with a second picture
TIMED = 16
CAPTION_SEED = 7
REFERENCE_STEPS = 100
SEEDS = {"first": 1_000_000, "second": 2_000_000, "reference": 3_000_000}  # image i has seed SEEDS[...] + i


@dataclass(frozen=True)
class Row:
    """Scores of one model at one number of steps; diversity and sharpness are ratios to the teacher's at 100 steps."""

    model: str
    steps: int
    guidance_scale: float
    fid_to_teacher: float
    caption_accuracy: float
    diversity: float
    sharpness: float
    seconds_per_image: float
    images: int


@dataclass(frozen=True)
class Measured:
    """What is kept of a set of pictures: features of the first and second seeds, verdicts, sharpness."""

    first: Tensor
    second: Tensor
    right: Tensor
    sharp: Tensor


def reference_file(split: Split) -> Path:
    return ASSETS / f"reference-{split}.safetensors"


def measure(studio: Studio, oracle: Oracle, role: str, steps: int, split: Split) -> Measured:
    """Draws the protocol's pictures of a model and reads them, a batch at a time."""
    texts = captions(CAPTIONS[split], CAPTION_SEED, split)
    features: dict[str, list[Tensor]] = {"first": [], "second": []}
    right, sharp = [], []
    jobs = [("first", i) for i in range(0, CAPTIONS[split], 50)] + [("second", i) for i in range(0, PAIRS[split], 50)]
    for which, start in track(jobs, f"{role} {steps}"):
        rows = texts[start : start + 50]
        images = studio.images(role, rows, range(SEEDS[which] + start, SEEDS[which] + start + len(rows)), steps, 25)
        features[which].append(oracle.features(images))
        if which == "first":
            right.append(oracle.is_right(images, rows))
            sharp.append(sharpness(images))
    return Measured(torch.cat(features["first"]), torch.cat(features["second"]), torch.cat(right), torch.cat(sharp))


def _seconds_per_image(studio: Studio, role: str, steps: int, split: Split) -> tuple[float, Tensor]:
    """Times a batch of 16 pictures, decoding included; returns the pictures too."""
    texts = captions(TIMED, CAPTION_SEED, split)
    started = time.perf_counter()
    images = studio.images(role, texts, range(SEEDS["first"], SEEDS["first"] + TIMED), steps, TIMED)
    return (time.perf_counter() - started) / TIMED, images


def score(studio: Studio, split: Split, student_steps: int, few_steps: int = 4) -> list[Row]:
    """Rows for the teacher at 100 and at ``few_steps`` steps and for the student at ``student_steps``.

    Raises:
        UserError: the reference does not belong to this teacher.
    """
    if studio.guidance_scale != GUIDANCE_SCALE:
        raise UserError(
            f"this run's teacher has guidance scale {studio.guidance_scale:g}; scores compare with the toy teacher's pictures "
            f"at {GUIDANCE_SCALE:g}, so there is nothing to score it with"
        )
    oracle = Oracle.load(ORACLE)
    stored = load_tensors(reference_file(split))
    reference = stored["reference"].float()
    teacher = Measured(*(stored[name].float() for name in ("first", "second", "right", "sharp")))
    timed = {(TEACHER, REFERENCE_STEPS): _seconds_per_image(studio, TEACHER, REFERENCE_STEPS, split)}
    again = oracle.features(timed[TEACHER, REFERENCE_STEPS][1])
    if (again - teacher.first[:TIMED]).abs().median() > 0.05:
        raise UserError(
            f"{reference_file(split)} was made with another teacher or oracle, or with a negative prompt; "
            "if the teacher was built anew, delete it and run 'python -m rapm.toy.score'"
        )
    rows = []
    for role, steps in ((TEACHER, REFERENCE_STEPS), (TEACHER, few_steps), (STUDENT, student_steps)):
        is_reference = (role, steps) == (TEACHER, REFERENCE_STEPS)
        measured = teacher if is_reference else measure(studio, oracle, role, steps, split)
        seconds, _ = timed.get((role, steps)) or _seconds_per_image(studio, role, steps, split)
        rows.append(
            Row(
                model=role,
                steps=steps,
                guidance_scale=studio.guidance_scale if role == TEACHER else 1.0,
                fid_to_teacher=frechet_distance(measured.first, reference),
                caption_accuracy=float(measured.right.float().mean()),
                diversity=pair_distance(measured.first[: PAIRS[split]], measured.second)
                / pair_distance(teacher.first[: PAIRS[split]], teacher.second),
                sharpness=float(measured.sharp.mean() / teacher.sharp.mean()),
                seconds_per_image=seconds,
                images=len(measured.first),
            )
        )
    return rows


def missed_bars(rows: list[Row]) -> list[str]:
    """What a student falls short of, in words; empty when it clears every bar."""
    full, few, student = rows
    bars = (
        ("FID to the teacher", student.fid_to_teacher, "<=", 0.3 * few.fid_to_teacher),
        ("caption accuracy", student.caption_accuracy, ">=", 0.9 * full.caption_accuracy),
        ("diversity", student.diversity, ">=", 0.9),
        ("sharpness", student.sharpness, ">=", 0.9),
    )
    return [
        f"{name} is {value:.3f}, the bar is {sign} {bar:.3f}"
        for name, value, sign, bar in bars
        if not (value <= bar if sign == "<=" else value >= bar)
    ]


def as_dicts(rows: list[Row]) -> list[dict]:
    return [asdict(row) for row in rows]

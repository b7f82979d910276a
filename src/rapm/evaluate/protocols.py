"""Protocols that score pictures by published networks: what is drawn, what is compared.

``teacher`` needs no pictures: the student is compared with its own teacher on prompts that it was
not trained on. ``coco`` and ``images`` compare with real pictures. Each choice that a protocol
leaves is written into the result, because published numbers rarely state theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rapm.errors import UserError
from rapm.evaluate.captions import captions_beside, chosen, pictures_in, read_captions
from rapm.evaluate.drawing import Gallery, Measured, Model, Samplers
from rapm.evaluate.features import CLIP
from rapm.evaluate.metrics import Score, frechet, kernel, mean, pair_distances
from rapm.evaluate.rows import Row
from rapm.models.teacher import Teacher
from rapm.network import TEACHER
from rapm.prompts import shipped

ProtocolName = Literal["teacher", "coco", "images"]
COUNT = {"teacher": 2_500, "coco": 30_000, "images": None}
MANY_STEPS, EIGHT = 50, 8  # the teacher's, besides the student's number
LOWER_GUIDANCE = (5.0, 3.0, 2.0)  # few steps bear less of it than many
PAIRS = 200  # prompts with a second picture, for diversity
FIRST, SECOND = 1_000_000, 2_000_000  # picture i has seed FIRST + i, its second one SECOND + i
REPORTED = """Reported by their authors, and not ours, for SDXL at 4 steps on COCO-2014, 30K, FID \
/ CLIP: PCM 22.84 / 30.36, DMD2 18.24 / 30.85, RAPM 19.21 / 30.50"""


@dataclass(frozen=True)
class Choices:
    """What a protocol leaves open.

    Attributes:
        captions: a file; see :func:`rapm.evaluate.captions.read_captions`.
        images: the folder of real pictures.
        count: captions; None is the protocol's own number.
        resize: pictures, real and drawn, to so many pixels each way before anything reads them;
            None: they go to Inception's 299 as they are.
        reference: the real pictures of the captions, or all of the folder.
        prefix: before each text that CLIP reads.
        many_steps: the teacher's.
        with_teacher: the teacher's rows too; ``teacher`` always has them.
    """

    name: ProtocolName
    captions: Path | None = None
    images: Path | None = None
    count: int | None = None
    resize: int | None = None
    reference: Literal["all", "paired"] = "all"
    prefix: str = ""
    many_steps: int = MANY_STEPS
    with_teacher: bool = False


@dataclass(frozen=True)
class Task:
    """A protocol with its captions read.

    Attributes:
        texts: to draw from.
        source: where they come from, in words.
        pictures: real ones to compare with; none under ``teacher``.
    """

    choices: Choices
    texts: Sequence[str]
    source: str
    pictures: Sequence[Path]

    def facts(self, marks: Mapping[str, str]) -> dict[str, Any]:
        """All choices, to be told with the scores.

        Args:
            marks: of the networks that read, by name.
        """
        own, listed = self.choices, json.dumps(list(self.texts))
        told: dict[str, Any] = {
            "name": own.name,
            "captions": self.source,
            "count": len(self.texts),
            "captions_sha256": hashlib.sha256(listed.encode()).hexdigest()[:12],
            "resize": own.resize or "none",
        }
        if own.images is None:
            told |= {"reference": "the teacher's pictures", "many_steps": own.many_steps}
            told |= {"pairs_for_diversity": len(self.texts[:PAIRS])}
        else:
            files = [(file.name, file.stat().st_size) for file in self.pictures]
            mark = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
            told |= {"images": own.images.resolve().name, "images_mark": mark}
            told |= {"reference": own.reference, "references": len(self.pictures)}
        if CLIP in marks:
            told["clip_prefix"] = own.prefix or "none"
        return told | {f"{name}_sha256": mark for name, mark in marks.items()}


def open_task(choices: Choices, teacher: Teacher, trained_on: Sequence[str]) -> Task:
    """Reads captions, and finds the pictures to compare with.

    Args:
        teacher: whose own captions, if it brings some, are taken where none are named.
        trained_on: prompts that protocol ``teacher`` leaves out.

    Raises:
        UserError: something is missing, empty or too little.
    """
    own, name = choices, choices.name
    if name != "teacher" and own.images is None:
        raise UserError(f"protocol {name} compares with pictures: name their folder with --images")
    if name == "coco" and own.captions is None:
        raise UserError(
            "protocol coco takes captions_val2014.json, Karpathy's dataset_coco.json or a list, by "
            "--captions"
        )
    files = pictures_in(own.images) if own.images else []
    usual = COUNT[name]
    if own.captions:
        source, pairs = own.captions.name, read_captions(own.captions)
    elif own.images:
        source, pairs = "beside the pictures", captions_beside(own.images)
    elif teacher.captions:
        source, texts = "the teacher's own", teacher.captions(own.count or usual or 0, 1, "test")
        pairs = [(text, "") for text in texts]
    else:
        source, pairs = "rapm's own", [(text, "") for text in shipped(None, 1)]
    if name == "teacher":
        known = {*trained_on}
        pairs = [pair for pair in pairs if pair[0] not in known]
    pairs = chosen(pairs, own.count or min(usual or len(pairs), len(pairs)))
    if own.reference == "paired":
        there = {file.name: file for file in files}
        missing = [pair for pair in pairs if pair[1] not in there]
        if missing:
            text, picture = missing[0]
            raise UserError(
                f"{picture or 'the picture'} of '{text}' is not in {own.images}, nor are "
                f"{len(missing) - 1} more; --reference all takes those that are there"
            )
        files = [there[picture] for _, picture in pairs]
    if min(len(pairs), len(files) or 2) < 2:
        raise UserError("scores take two captions and two pictures at least")
    return Task(own, [text for text, _ in pairs], source, files)


def teacher_models(
    facts: Mapping[str, Any], guidance_scale: float, many_steps: int, steps: int
) -> list[Model]:
    """The teacher's rows: many steps, eight, the student's number, and that at lower guidance."""
    places = dict.fromkeys((many_steps, EIGHT, steps))
    rows = [(n, guidance_scale) for n in places]
    rows += [(steps, scale) for scale in LOWER_GUIDANCE if scale < guidance_scale]
    return [Model("teacher", TEACHER, TEACHER, n, scale, facts) for n, scale in rows]


def score(
    task: Task, models: Sequence[Model], samplers: Samplers, gallery: Gallery
) -> tuple[list[Row], list[str]]:
    """Rows of all models, and notes on what is left out of them.

    Args:
        models: under ``teacher`` the first one is the teacher at many steps; the last one is what
            is asked for.
    """
    texts, against_teacher = task.texts, task.choices.images is None
    pairs = texts[:PAIRS]
    # The last one first: whether it can be drawn at all must not be found out after hours.
    drawn = {}
    for model in (models[-1], *models[:-1]):
        first = gallery.of_model(model, samplers, texts, FIRST)
        second = gallery.of_model(model, samplers, pairs, SECOND) if against_teacher else {}
        drawn[id(model)] = first, second
    if against_teacher:
        reference = gallery.of_model(models[0], samplers, texts, SECOND)
    else:
        reference = gallery.of_files(task.pictures)
    rows, apart = [], 1.0
    for model in models:
        first, second = drawn[id(model)]
        scores = compared(first, reference)
        if against_teacher:
            own = pair_distances(first["features"][: len(pairs)], second["features"])
            if model is models[0]:
                apart = float(own.mean()) or 1.0
            scores["diversity"] = mean(own / apart)
        rows.append(Row(model.name, model.steps, model.guidance_scale, len(texts), scores))
    return rows, _left_out(rows, gallery, min(len(texts), len(reference["features"])))


def compared(measured: Measured, reference: Measured) -> dict[str, Score]:
    """Distances to the reference, and how well pictures fit their texts."""
    scores: dict[str, Score] = {}
    for name, kind in (("fid", "features"), ("patch_fid", "patches")):
        if kind in measured and kind in reference:
            a, b = measured[kind], reference[kind]
            if min(len(a), len(b)) > a.shape[1]:
                scores[name] = frechet(a, b)
    scores["kid"] = kernel(measured["features"], reference["features"])
    texts = ("clip", "pickscore")
    return scores | {name: mean(measured[name]) for name in texts if name in measured}


def _left_out(rows: Sequence[Row], gallery: Gallery, pictures: int) -> list[str]:
    notes, reader = [], gallery.reader
    if any("fid" not in row.scores for row in rows):
        notes.append(
            f"FID is left out: with {reader.inception.dimensions:,} features it takes more "
            f"pictures than that, and there are {pictures:,}"
        )
    elif any("patch_fid" not in row.scores for row in rows):
        notes.append("Patch FID is left out: not all pictures have 299 pixels each way")
    return notes + [f"Scored without {name}/, which --weights lacks" for name in reader.absent]

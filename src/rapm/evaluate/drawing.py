"""Pictures of a model, drawn and read batch by batch. What is read is kept, so that a stop loses
little and the teacher's pictures are drawn once."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rapm.errors import UserError
from rapm.evaluate.captions import open_picture
from rapm.evaluate.features import Reader
from rapm.io import load_checked, save_checked
from rapm.pictures import to_pictures
from rapm.progress import track
from rapm.sample import Sampler

BATCH = 50  # pictures in a file
Measured = dict[str, Tensor]  # by the names of Reader, for all pictures


class Samplers:
    """Opens what draws when it is asked to, and holds one network at a time.

    Args:
        makers: by the name of what is loaded.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Sampler]]) -> None:
        self._makers, self._held, self._sampler = makers, "", None

    def __getitem__(self, name: str) -> Sampler:
        if self._sampler is None or name != self._held:
            self._sampler = None
            gc.collect()
            self._held, self._sampler = name, self._makers[name]()
        return self._sampler


@dataclass(frozen=True)
class Model:
    """What is scored.

    Attributes:
        name: as the table shows it.
        source: in :class:`Samplers`.
        adapter: of the network that draws, TEACHER or STUDENT.
        facts: what else its pictures depend on: weights, size, precision, scheduler.
    """

    name: str
    source: str
    adapter: str
    steps: int
    guidance_scale: float
    facts: Mapping[str, Any]


class Gallery:
    """Reads pictures, and keeps what was read.

    Args:
        reader: the networks that read.
        side: pictures are resized to so many pixels each way first; None leaves them as they are.
        folder: where features are kept, for all runs together.
    """

    def __init__(self, reader: Reader, side: int | None, folder: Path) -> None:
        self.reader, self.side, self.folder = reader, side, folder

    def of_model(
        self, model: Model, samplers: Samplers, texts: Sequence[str], first_seed: int
    ) -> Measured:
        """Reads a model's pictures of the texts; picture i has seed first_seed + i."""
        own = [model.adapter, model.steps, model.guidance_scale, model.facts]

        def drawn(start: int, end: int) -> tuple[list[Image.Image], Sequence[str]]:
            sampler, seeds = samplers[model.source], range(first_seed + start, first_seed + end)
            images = sampler.images(
                model.adapter,
                texts[start:end],
                seeds,
                model.steps,
                guidance_scale=model.guidance_scale,
            )
            if not images.isfinite().all():
                raise UserError(f"{model.name} at {model.steps} steps draws what is no number")
            return to_pictures(images), texts[start:end]

        title = f"{model.name} {model.steps}"
        return self._read(title, own, [*enumerate(texts, first_seed)], drawn)

    def of_files(self, files: Sequence[Path]) -> Measured:
        """Reads pictures of a folder."""

        def opened(start: int, end: int) -> tuple[list[Image.Image], Sequence[str]]:
            return [open_picture(file) for file in files[start:end]], ()

        return self._read("references", "files", facts_of_files(files), opened)

    def _read(
        self,
        title: str,
        own: Any,
        each: Sequence[Any],
        pictures: Callable[[int, int], tuple[list[Image.Image], Sequence[str]]],
    ) -> Measured:
        """Batches of ``each``, the facts of a picture, that are not kept yet are made and read."""
        parts: list[Measured] = []
        starts = range(0, len(each), BATCH)
        for start in track(starts, title[:24]):
            rows = [*each[start : start + BATCH]]
            facts = {"own": own, "each": rows, "side": self.side, "read by": self.reader.facts}
            text = json.dumps(facts, sort_keys=True, default=str)
            made = {"facts": hashlib.sha256(text.encode()).hexdigest()}
            file = self.folder / f"{made['facts'][:32]}.safetensors"
            found = _kept(file, made)
            if found is None:
                shown, texts = pictures(start, start + len(rows))
                if self.side:
                    shown = [
                        p.resize((self.side, self.side), Image.Resampling.BICUBIC) for p in shown
                    ]
                found = self.reader(shown, texts)
                save_checked(file, found, made)
            parts.append(found)
        common = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]) for name in common}


def facts_of_files(files: Sequence[Path]) -> list[list[Any]]:
    """By which it is seen that a file is another one: place, size, time of its last change."""
    return [[str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns] for f in files]


def _kept(file: Path, made: Mapping[str, Any]) -> Measured | None:
    try:
        told, tensors = load_checked(file)
    except UserError:  # there is none, or it is damaged
        return None
    return tensors if told == made else None

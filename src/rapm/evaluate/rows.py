"""Scores of models side by side, whatever protocol they are by; and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rapm.evaluate.metrics import Score
from rapm.io import write_json

# By a score's name: its title, and how many digits are shown.
TITLES = {
    "fid": ("FID", 3),
    "patch_fid": ("patch FID", 3),
    "kid": ("KID", 5),
    "clip": ("CLIP", 2),
    "pickscore": ("PickScore", 2),
    "captions": ("captions", 3),
    "diversity": ("diversity", 3),
    "sharpness": ("sharpness", 3),
}


@dataclass(frozen=True)
class Row:
    """Scores of one model at one number of steps.

    Attributes:
        images: how many pictures they are of.
        scores: by the names of :data:`TITLES`.
        seconds_per_image: decoding included; None where it was not timed.
    """

    model: str
    steps: int
    guidance_scale: float
    images: int
    scores: Mapping[str, Score]
    seconds_per_image: float | None = None

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Row:
        """From JSON."""
        return cls(**{**told, "scores": {n: Score(**s) for n, s in told["scores"].items()}})


@dataclass(frozen=True)
class Scores:
    """Rows, and what they are by.

    Attributes:
        protocol: its name and all choices that it leaves; scores of two protocols that differ in
            any of them are not comparable.
        notes: lines on what is left out, and what others reported, which is not ours.
    """

    protocol: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def save(self, file: Path, made: Mapping[str, Any]) -> None:
        """Writes them.

        Args:
            made: what else is to be known of them.
        """
        write_json(file, {**asdict(self), **made, "rapm": version("rapm")})

    @classmethod
    def load(cls, file: Path, made: Mapping[str, Any]) -> Scores | None:
        """Those of a file; None where it is of something else than ``made`` says, or none."""
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            asked = {**made, "rapm": version("rapm")}
            if any(known[name] != value for name, value in asked.items()):
                return None
            scores = cls(
                {"name": known["protocol"]["name"], **known["protocol"]},
                [Row.read(row) for row in known["rows"]],
                [str(note) for note in known["notes"]],
            )
            scores.cells()  # what is no number is found here
            return scores if scores.rows else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    @staticmethod
    def may_replace(file: Path) -> bool:
        """Whether scores may be written there: to no file, or over other scores."""
        try:
            return "protocol" in json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return True
        except (OSError, ValueError, TypeError):
            return False

    def described(self) -> str:
        """The protocol in a line."""
        rest = {name: value for name, value in self.protocol.items() if name != "name"}
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in rest.items())
        return f"protocol {self.protocol['name']}: {told}"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Titles, and each row's cells; an interval stands behind its score as +-."""
        names = [name for name in TITLES if any(name in row.scores for row in self.rows)]
        timed = any(row.seconds_per_image is not None for row in self.rows)
        titles = ["model", "steps", "guidance", *(TITLES[name][0] for name in names)]
        rows = []
        for row in self.rows:
            cells = [row.model, f"{row.steps}", f"{row.guidance_scale:g}"]
            for name in names:
                score, digits = row.scores.get(name), TITLES[name][1]
                apart = f" ±{score.high - score.value:.{digits}f}" if score else ""
                cells.append(f"{score.value:.{digits}f}{apart}" if score else "")
            if timed:
                taken = row.seconds_per_image
                cells.append("" if taken is None else f"{taken:.3f}")
            rows.append(cells)
        return titles + ["s/image"] * timed, rows

    def render(self) -> list[str]:
        """A table of lines, what it is by, and the notes."""
        titles, rows = self.cells()
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if k else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (titles, *rows)
        ]
        return [*lines, "", self.described(), *self.notes]

"""Writes the README's table: ``python benchmarks/readme_table.py RUN [RUN ...]``.

Each run is one of the toy teacher's, scored by ``rapm evaluate RUN``. The README's table comes from
here: the teacher at its best guidance for 4 steps, and the students in the order given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markers import markdown, replace_between
from rapm.run import Run
from rapm.scores import scores_of
from rapm.toy import ASSETS

FIGURES = ASSETS / "figures-test.json"  # python tools/toy/score.py
README = Path(__file__).parents[1] / "README.md"
START = "<!-- table: benchmarks/readme_table.py -->"
TITLES = ("model", "network calls", "FID to teacher", "captions right", "diversity", "sharpness")
NAMES = {"rapm": "RAPM", "midpoint": "midpoint"}


def table(folders: Sequence[Path]) -> str:
    """Markdown."""
    few = json.loads(FIGURES.read_text(encoding="utf-8"))["lower_guidance"]
    best = min((r for r in few if r["steps"] == 4), key=lambda r: r["fid"])
    rows = [cells(f"teacher, 4 steps, guidance {best['guidance_scale']:g}", best)]
    for folder in folders:
        run = Run.existing(folder)
        scores = next(found for found in scores_of(run) if found.protocol["name"] == "toy")
        student = asdict(next(row for row in scores.rows if row.model == "student"))
        student |= {name: score["value"] for name, score in student["scores"].items()}
        name = f"{NAMES[run.config.method]}, {student['steps']} steps"
        rows.append(cells(f"{name}, seed {run.config.training.seed}", student))
    return markdown(TITLES, rows)


def cells(model: str, row: Mapping[str, Any]) -> list[str]:
    """A line of scores, which stand under their names."""
    calls = row["steps"] * (1 if row["guidance_scale"] == 1 else 2)
    scored = [f"{row[score]:.3f}" for score in ("fid", "captions")]
    return [model, str(calls), *scored, *(f"{row[s]:.2f}" for s in ("diversity", "sharpness"))]


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    replace_between(README, START, table([Path(argument) for argument in sys.argv[1:]]))


if __name__ == "__main__":
    main()

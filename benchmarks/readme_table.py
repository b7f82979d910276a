"""Writes the README's table: ``python benchmarks/readme_table.py RUN [RUN ...]``.

Each run is one of the toy teacher's, scored by ``rapm evaluate RUN``. The README's table comes from
here: the teacher at its best guidance for 4 steps, and the students in the order given.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markers import markdown, replace_between
from rapm.toy import ASSETS

FIGURES = ASSETS / "figures-test.json"  # python tools/toy/score.py
README = Path(__file__).parents[1] / "README.md"
START = "<!-- table: benchmarks/readme_table.py -->"
TITLES = ("model", "network calls", "FID to teacher", "captions right", "diversity", "sharpness")
NAMES = {"rapm": "RAPM", "midpoint": "midpoint"}


def table(folders: Sequence[Path]) -> str:
    """Markdown."""
    few = json.loads(FIGURES.read_text(encoding="utf-8"))["lower_guidance"]
    best = min((r for r in few if r["steps"] == 4), key=lambda r: r["fid_to_teacher"])
    rows = [cells(f"teacher, 4 steps, guidance {best['guidance_scale']:g}", best)]
    for folder in folders:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        student = next(row for row in scores["rows"] if row["model"] == "student")
        name = f"{NAMES[scores['method']]}, {student['steps']} steps"
        rows.append(cells(f"{name}, seed {config['training']['seed']}", student))
    return markdown(TITLES, rows)


def cells(model: str, row: Mapping[str, Any]) -> list[str]:
    """A line, of scores by the names of :class:`rapm.evaluate.toy.Row`."""
    calls = row["steps"] * (1 if row["guidance_scale"] == 1 else 2)
    scored = [f"{row[score]:.3f}" for score in ("fid_to_teacher", "caption_accuracy")]
    return [model, str(calls), *scored, *(f"{row[s]:.2f}" for s in ("diversity", "sharpness"))]


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    replace_between(README, START, table([Path(argument) for argument in sys.argv[1:]]))


if __name__ == "__main__":
    main()

"""Writes scores of toy runs into the README's table: ``python benchmarks/readme_table.py runs/demo
[runs/seed-1 ...]``.

The README's figures come from here and nowhere else. Each run must have been scored by ``rapm
evaluate RUN``.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from markers import markdown, replace_between

from rapm.toy import ASSETS

FIGURES = ASSETS / "figures-test.json"  # python -m rapm.toy.score
README = Path(__file__).parents[1] / "README.md"
START = "<!-- table: benchmarks/readme_table.py -->"
TITLES = (
    "model",
    "steps",
    "guidance",
    "network calls",
    "FID to teacher",
    "caption accuracy",
    "diversity",
    "sharpness",
    "s a picture",
)


def table(folders: list[Path]) -> str:
    rows = []
    for place, folder in enumerate(folders):
        scores = json.loads((folder / "scores.json").read_text())
        seed = tomllib.loads((folder / "config.toml").read_text())["training"]["seed"]
        for row in scores["rows"]:
            if place and row["model"] == "teacher":
                continue
            name = row["model"] + (f" (training seed {seed})" if row["model"] == "student" else "")
            rows.append([name, *cells(row), f"{row['seconds_per_image']:.3f}"])
        if not place:  # what the teacher does in few steps if asked for less guidance
            rows += [
                ["teacher", *cells(row), ""]
                for row in json.loads(FIGURES.read_text())["lower_guidance"]
            ]
    rows.sort(key=lambda row: row[0].startswith("student"))
    return markdown(TITLES, rows)


def cells(row: dict[str, Any]) -> list[str]:
    """What is shown of scores by the names of :class:`rapm.evaluate.toy.Row`."""
    calls = row["steps"] * (1 if row["guidance_scale"] == 1 else 2)
    scored = [f"{row[score]:.3f}" for score in ("fid_to_teacher", "caption_accuracy")]
    scored += [f"{row[score]:.2f}" for score in ("diversity", "sharpness")]
    return [str(row["steps"]), f"{row['guidance_scale']:g}", str(calls), *scored]


def main() -> None:
    replace_between(README, START, table([Path(argument) for argument in sys.argv[1:]]))


if __name__ == "__main__":
    main()

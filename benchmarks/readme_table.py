"""Writes scores of toy runs into the README's table: ``python benchmarks/readme_table.py runs/demo [runs/seed-1 ...]``.

The README's figures come from here and nowhere else. Each run must have been scored by ``rapm evaluate RUN``.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- table: benchmarks/readme_table.py -->", "<!-- end of table -->"


def table(folders: list[Path]) -> str:
    lines = [
        "| model | steps | network calls | FID to teacher | caption accuracy | diversity | sharpness | s a picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, folder in enumerate(folders):
        scores = json.loads((folder / "scores.json").read_text())
        seed = tomllib.loads((folder / "config.toml").read_text())["training"]["seed"]
        for row in scores["rows"]:
            if place and row["model"] == "teacher":
                continue
            name = row["model"] + (f" (training seed {seed})" if row["model"] == "student" else "")
            calls = row["steps"] * (1 if row["guidance_scale"] == 1 else 2)
            lines.append(
                f"| {name} | {row['steps']} | {calls} | {row['fid_to_teacher']:.3f} | {row['caption_accuracy']:.3f} | "
                f"{row['diversity']:.2f} | {row['sharpness']:.2f} | {row['seconds_per_image']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    text = README.read_text(encoding="utf-8")
    if START not in text or END not in text:
        sys.exit(f"{README} has lost its markers {START} ... {END}")
    replaced = re.sub(f"{START}.*{END}", lambda _: f"{START}\n{table(folders)}\n{END}", text, flags=re.DOTALL)
    README.write_text(replaced, encoding="utf-8")


if __name__ == "__main__":
    main()

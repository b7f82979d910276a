"""Tables and curves of the finished runs of paper.py: ``python benchmarks/paper_report.py``.

Writes benchmarks/results/paper.md; and for tables of claims TABLE.png beside it: FID and captions
of the test captions, over iterations and over hours of training and rollout. The curves take
matplotlib (``pip install -c constraints.txt -e '.[benchmarks]'``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
from markers import markdown
from paper import TABLES
from rapm.io import write_text
from runs import RESULTS, Spec

Line = Mapping[str, Any]
SCORES = {  # by their names in a line: title, digits
    "fid": ("FID", 3),
    "captions": ("captions", 3),
    "diversity": ("diversity", 2),
    "sharpness": ("sharpness", 2),
}
TITLES = ("run", "seeds", "iterations", "steps", *(t for t, _ in SCORES.values()), "hours")
# Tables of claims, which show the end of each run; the others, of choices, show all points.
CLAIMS = ("figure5", "figure3", "full")


def groups(specs: Sequence[Spec], done: Mapping[str, Line]) -> dict[str, list[Line]]:
    """Finished runs by name, seeds together, in the table's order."""
    found: dict[str, list[Line]] = {}
    for spec in specs:
        if spec.key in done:
            found.setdefault(spec.name, []).append(done[spec.key])
    return found


def hours(line: Line, point: Line) -> float:
    """Of training up to a point, and of the rollout before."""
    return (point["seconds"] + line["rollout_seconds"]) / 3600


def spread(values: Sequence[float], digits: int) -> str:
    """The mean; of several also the least and the most."""
    text = f"{statistics.mean(values):.{digits}f}"
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return text if len(values) == 1 else f"{text} ({least} to {most})"


def table(name: str, done: Mapping[str, Line]) -> str:
    """Markdown: a row for each variant, point and number of steps."""
    rows = []
    for variant, lines in groups(TABLES[name], done).items():
        rows += [
            [variant, str(line["seed"]), line["error"], *[""] * 6]
            for line in lines
            if "error" in line
        ]
        split = "test" if name in CLAIMS else "validation"
        scored = [
            (line, point)
            for line in lines
            if "error" not in line
            for point in line["points"]
            if point["split"] == split
        ]
        places = dict.fromkeys((point["iteration"], point["steps"]) for _, point in scored)
        last = max((iteration for iteration, _ in places), default=0)
        for iteration, steps in places:
            if name in CLAIMS and iteration != last:
                continue
            own = [
                (line, point)
                for line, point in scored
                if (point["iteration"], point["steps"]) == (iteration, steps)
            ]
            scores = [
                spread([p[key] for _, p in own], digits) for key, (_, digits) in SCORES.items()
            ]
            taken = spread([hours(*each) for each in own], 1)
            rows.append([variant, str(len(own)), f"{iteration:,}", str(steps), *scores, taken])
    return markdown(TITLES, rows)


def curves(specs: Iterable[Spec], done: Mapping[str, Line], file: Path) -> None:
    """FID and captions over iterations and over hours, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, 2, figsize=(10, 8), sharex="col", sharey="row", layout="constrained"
    )
    for colour, (name, lines) in enumerate(groups([*specs], done).items()):
        for line in lines:
            points = [p for p in line.get("points", ()) if p["split"] == "test"]
            places = [p["iteration"] for p in points], [hours(line, p) for p in points]
            for row, score in enumerate(("fid", "captions")):
                for column, at in enumerate(places):
                    panels[row][column].plot(
                        at,
                        [p[score] for p in points],
                        color=f"C{colour}",
                        marker="o",
                        markersize=3,
                        linewidth=1,
                        label=name if line is lines[0] and not (row or column) else None,
                    )
    panels[0][0].set(ylabel="FID to the teacher", yscale="log")
    panels[1][0].set(ylabel="captions drawn right", xlabel="iterations")
    panels[1][1].set(xlabel="hours of training and rollout")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "paper.jsonl")
    given = parser.parse_args()
    done = runs.read(given.results)
    parts = ["# Runs of benchmarks/paper.py", "Written by `python benchmarks/paper_report.py`."]
    for name, specs in TABLES.items():
        if groups(specs, done):
            parts += [f"## {name}", table(name, done)]
        if name in CLAIMS and groups(specs, done):
            curves(specs, done, given.results.with_name(f"{name}.png"))
    write_text(given.results.with_suffix(".md"), "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

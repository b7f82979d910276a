"""Writes the tables and the figure of docs/results.md from finished runs: ``python
benchmarks/paper_report.py [.paper]``.

With the folder of ``paper.py`` its results.jsonl is taken over into docs/ first; without, what is
in docs/ is shown again. The figure takes matplotlib (``pip install -c constraints.txt -e
'.[benchmarks]'``).
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import paper
from markers import markdown, replace_between

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, KEPT, FIGURE = DOCS / "results.md", DOCS / "results.jsonl", DOCS / "fid-curves.png"
SCORES = {
    "fid": ("FID", 3),
    "accuracy": ("accuracy", 3),
    "diversity": ("diversity", 2),
    "sharpness": ("sharpness", 2),
}
Runs = Sequence[Mapping[str, Any]]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and of several the least and the most."""
    text = f"{statistics.mean(values):.{digits}f}"
    return (
        text
        if len(values) == 1
        else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def groups(runs: Runs, table: str) -> dict[str, list[Mapping[str, Any]]]:
    """Runs of a table by name, seeds together."""
    own = [run for run in runs if run["table"] == table and run["lines"]]
    return {
        name: [run for run in own if run["name"] == name]
        for name in dict.fromkeys(run["name"] for run in own)
    }


def table(runs: Runs, name: str) -> str:
    """A line for each variant and number of steps."""
    rows = []
    for variant, own in groups(runs, name).items():
        last = [
            [line for line in run["lines"] if line["iteration"] == run["iterations"]] for run in own
        ]
        for place, steps in enumerate(line["steps"] for line in last[0]):
            lines = [each[place] for each in last]
            scored = [
                spread([line[key] for line in lines], digits) for key, (_, digits) in SCORES.items()
            ]
            many = len(last[0]) > 1
            seconds = [spread([line[part] for line in lines], 0) for part in ("seconds", "rollout")]
            label = f"{variant}, sampled in {steps}" if many else variant
            rows.append([label, str(len(own)), str(own[0]["updates"]), *seconds, *scored])
    titles = (
        "what",
        "seeds",
        "updates",
        "seconds of training",
        "of its rollout",
        *(title for title, _ in SCORES.values()),
    )
    return markdown(titles, rows)


def costs(runs: Runs) -> str:
    """Of the newest ``--costs``: what an update takes, and how many take as long as 600 of the
    first method, with rollouts; and memory, counted now."""
    found = next(run["seconds"] for run in reversed(runs) if run["table"] == "costs")
    memory = {
        name: paper.memory_of(paper.Spec("costs", name, *paper.NEIGHBOURS[name])) / 2**20
        for name in found
    }
    rows = [
        [
            name,
            f"{x['update']:.2f}",
            f"{x['trajectory']:.2f}",
            f"{x['updates']}",
            f"{memory[name]:.0f}",
        ]
        for name, x in found.items()
    ]
    return markdown(
        (
            "what",
            "seconds an update",
            "seconds a trajectory",
            "updates in the same time",
            "MiB at peak",
        ),
        rows,
    )


def figure(runs: Runs) -> None:
    """FID at each quarter of the runs of equal time, over updates and over seconds, all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 5), sharey=True, layout="constrained"
    )
    for colour, (name, own) in enumerate(groups(runs, "equal time").items()):
        for run in own:
            lines = run["lines"]
            given: dict[str, Any] = {
                "color": f"C{colour}",
                "marker": "o",
                "markersize": 3,
                "linewidth": 1,
            }
            label = name if run is own[0] else None
            left.plot([line["updates"] for line in lines], [line["fid"] for line in lines], **given)
            right.plot(
                [x["seconds"] + x["rollout"] for x in lines],
                [x["fid"] for x in lines],
                **given,
                label=label,
            )
    left.set(xlabel="updates of the student", ylabel="FID to the teacher", yscale="log")
    right.set(xlabel="seconds of training and of its rollout")
    left.set_yticks(ticks := [0.2, 0.5, 1, 2], [str(tick) for tick in ticks])
    left.minorticks_off()
    panels.legend(loc="outside lower center", ncols=3, fontsize=8)
    panels.savefig(FIGURE, dpi=110)


def main() -> None:
    if sys.argv[1:]:
        shutil.copy(Path(sys.argv[1]) / "results.jsonl", KEPT)
    runs = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    for name in dict.fromkeys(run["table"] for run in runs):
        if f"paper_report.py {name} " not in RESULTS.read_text(encoding="utf-8"):
            print(f"{RESULTS} has no place for table '{name}' yet")
            continue
        replace_between(
            RESULTS,
            f"<!-- table: benchmarks/paper_report.py {name} -->",
            costs(runs) if name == "costs" else table(runs, name),
        )
    if groups(runs, "equal time"):
        figure(runs)


if __name__ == "__main__":
    main()

"""What a run's page shows, gathered from the run's folder."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template

from rapm import settings
from rapm.config import unread
from rapm.evaluate.rows import Scores
from rapm.export import exported
from rapm.io import read, write_text
from rapm.report.charts import Line, chart, smooth
from rapm.run import Run
from rapm.samples import FEW, MANY, OF_STUDENT, OF_TEACHER, cut, drawn_iterations, row_file
from rapm.scores import scores_of
from rapm.signs import find_signs
from rapm.status import progress_of
from rapm.trajectories import stored_prompts

LARGE, SMALL = 384, 128  # pixels of a picture's longer side: to compare, and in the grid
TERMS = ("relative", "absolute")
Records = Sequence[Mapping[str, Any]]


def write_report(runs: Sequence[Run], file: Path) -> Path:
    """Writes a page about one run, or about several side by side.

    One HTML file without links to anything outside. It may be written while a run trains; it locks
    nothing.

    Raises:
        UserError: a run's records are damaged.

    Usage::

        run = Run.existing(Path("runs/mine"))
        write_report([run], run.page)
    """
    shown = [about(run) for run in runs]
    several = len(shown) > 1
    text = _template().render(
        runs=shown,
        compared=comparison(shown) if several else [],
        differing=differences(runs) if several else [],
        scored=side_by_side(shown) if several else [],
        version=version("rapm"),
    )
    write_text(file, text)
    return file


@cache
def _template() -> Template:
    """Compiled once: a page is written many times in a run."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html.j2")


def about(run: Run) -> dict[str, Any]:
    """All that is said about one run."""
    config, metrics, samples = run.config, run.read_metrics(), run.read_samples()
    progress = progress_of(config, metrics)
    return {
        "name": run.folder.resolve().name,
        "method": config.method,
        "teacher": os.path.basename(config.teacher),
        "steps": config.trajectories.slots,
        "guidance": config.trajectories.guidance_scale,
        "progress": progress,
        "memory": max((record.get("memory_gib", 0.0) for record in samples), default=0.0),
        "signs": find_signs(config, metrics, samples),
        "charts": charts(metrics, samples, config.training.gradient_clip),
        "metrics": metrics,
        "samples": samples,
        "plan": read(run.plan).decode() if run.plan.is_file() else "",
        "scores": scores_of(run),
        "settings": settings.dump(config),
        "files": files_of(run),
    } | pictures(run)


# ---- pictures


def pictures(run: Run) -> dict[str, Any]:
    """Rows of pictures, and one prompt's trajectory; empty where none were drawn."""
    folder, made, steps = run.samples, drawn_iterations(run), run.config.trajectories.slots
    rows = [("teacher, many steps", folder / MANY, LARGE)]
    rows += [(f"teacher, {steps} steps", folder / FEW, LARGE)]
    rows += [(f"iteration {k:,}", row_file(folder, k), SMALL) for k in made[:-1]]
    rows += [(f"student, iteration {k:,}", row_file(folder, k), LARGE) for k in made[-1:]]
    paths = [("teacher", folder / OF_TEACHER), ("student", folder / OF_STUDENT)]
    found: dict[str, Any] = {
        "rows": [
            {"title": title, "large": side == LARGE, "pictures": embedded(file, side)}
            for title, file, side in rows
        ],
        "path": [(title, embedded(file, SMALL)) for title, file in paths],
    }
    # No page is refused for a picture that is not there, or damaged.
    found["rows"] = [row for row in found["rows"] if row["pictures"]]
    found["path"] = [(title, row) for title, row in found["path"] if row]
    count = len(found["rows"][0]["pictures"]) if found["rows"] else 0
    found["prompts"] = [prompt.text for prompt in stored_prompts(run.trajectories)][:count]
    return found


def embedded(file: Path, side: int) -> list[str]:
    """A row's pictures as data, each at most ``side`` pixels on its longer side; none of a row that
    cannot be read."""
    found = []
    try:
        row = cut(file)
    except (OSError, SyntaxError):  # the latter of a PNG with damaged parts
        return []
    for picture in row:
        picture.thumbnail((side, side))
        written = io.BytesIO()
        picture.save(written, format="WEBP", quality=82)
        found.append(f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}")
    return found


# ---- charts


def lines_of(records: Records, names: Mapping[str, str]) -> dict[str, Line]:
    """Lines of what was logged, smoothed; by title, where there is any."""
    found = {}
    for name, title in names.items():
        values = [(record["iteration"], record[name]) for record in records if name in record]
        if values:
            found[title] = smooth(values)
    return found


def charts(metrics: Records, samples: Records, clip: float) -> list[str]:
    """SVGs of all that was logged."""
    by_slot = {
        key: f"slot {key.rpartition('/')[2]}"
        for key in sorted({key for record in metrics[:2] for key in record})
        if "distance/" in key and not key.startswith("relative")
    }
    discriminators = {f"{t}_discriminator_gradient": f"{t} discriminator" for t in TERMS}
    told: list[tuple[str, Records, Mapping[str, str], dict[str, Any]]] = [
        (
            "Distance to the target",
            metrics,
            {"distance": "distance"} | {f"{t}_distance": f"{t} position" for t in TERMS},
            {"log": True},
        ),
        ("Distance, slot by slot; slot 0 is the last step", metrics, by_slot, {"log": True}),
        (
            "Discriminators' margin: real less fake",
            metrics,
            {f"{t}_margin": t for t in TERMS},
            {"level": 0.0},
        ),
        (
            "Length of the gradients, before the clip",
            metrics,
            {"student_gradient": "student"} | discriminators,
            {"log": True, "level": clip},
        ),
        (
            "Pictures, as shares of the teacher's",
            samples,
            {name: name for name in ("brightness", "contrast", "sharpness")},
            {"level": 1.0},
        ),
        (
            "Layout; 1 is the distance between prompts",
            samples,
            {"to_teacher": "from the teacher's", "moved": "from the sample before"},
            {},
        ),
        ("FID to the teacher", samples, {"fid": "FID"}, {"log": True}),
        ("Captions drawn right", samples, {"captions": "captions"}, {}),
    ]
    found = []
    for title, records, names, how in told:
        lines = lines_of(records, names)
        if lines:
            found.append(chart(title, lines, **how))
    return found


# ---- several runs


def comparison(shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """SVGs with a line for each run."""
    wanted = {
        "FID to the teacher": ("samples", ["fid"]),
        "Captions drawn right": ("samples", ["captions"]),
        "Layout: distance from the teacher's": ("samples", ["to_teacher"]),
        "Sharpness, as a share of the teacher's": ("samples", ["sharpness"]),
        "Distance to the target": ("metrics", ["absolute_distance", "distance"]),
    }
    found = []
    for title, (where, names) in wanted.items():
        lines: dict[str, Line] = {}
        for place, run in enumerate(shown):
            own = lines_of(run[where], {name: name for name in names})
            lines |= {f"{place + 1} {run['name']}": line for line in own.values()}
        if lines:
            found.append(chart(title, lines))
    return found


def side_by_side(shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Students' scores by each protocol that several runs have: a table for those with the same
    choices; and of the others, in which choices they differ from the first run's."""
    scored = [
        (f"{place + 1} {run['name']}", scores)
        for place, run in enumerate(shown)
        for scores in run["scores"]
    ]
    found = []
    for name in dict.fromkeys(scores.protocol["name"] for _, scores in scored):
        own = [(title, s) for title, s in scored if s.protocol["name"] == name]
        if len(own) == 1:
            continue
        first = own[0][1].protocol
        same = [(title, s) for title, s in own if s.protocol == first]
        others = []
        for title, scores in own:
            keys = sorted({*first, *scores.protocol})
            differ = [key for key in keys if first.get(key) != scores.protocol.get(key)]
            others += [(title, ", ".join(differ).replace("_", " "))] if differ else []
        rows = [replace(scores.rows[-1], model=title) for title, scores in same]
        found.append({"name": name, "table": Scores(first, rows).cells(), "others": others})
    return found


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: key, and the value of each."""
    flat = []
    for run in runs:
        left_out = unread(run.config.method)
        both = settings.flatten(run.config.model_dump())
        flat.append({key: str(value) for key, value in both.items() if key not in left_out})
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [(name, [each.get(name, "") for each in flat]) for name in names]
    return [row for row in rows if len({*row[1]}) > 1]


# ---- the rest


def files_of(run: Run) -> dict[str, str]:
    """Names of the exported files; empty before the export."""
    files = vars(exported(run))
    return {program: file.name for program, file in files.items() if file.is_file()}

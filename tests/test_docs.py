"""Commands of the documents: they are understood, and the toy teacher's ablations run."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from rapm import settings
from rapm.config import Config
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run

DOCS = Path(__file__).parents[1]
PAGES = [DOCS / "README.md", *sorted((DOCS / "docs").glob("[!l]*.md"))]
FEW = ["trajectories.count=2", "trajectories.fine_steps=2", "training.iterations=2"]


def commands(page: Path, start: str) -> list[list[str]]:
    lines = re.findall(rf"^ {{4}}({start} .*?)(?: +#.*)?$", page.read_text("utf-8"), re.M)
    return [shlex.split(line) for line in lines]


def option(command: list[str], name: str) -> list[str]:
    return [value for key, value in pairwise(command) if key == f"--{name}"]


def asked(command: list[str], more: list[str]) -> Config:
    def one(name: str) -> str | None:
        return next(iter(option(command, name)), None)

    return settings.load(
        method=one("method"),
        preset=one("preset"),
        teacher=one("teacher"),
        settings=[*option(command, "set"), *more],
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_of_every_command_are_known(page: Path) -> None:
    for start in ("rapm distill", "rapm trajectories", "rapm plan"):
        for command in commands(page, start):
            assert asked(command, [])


ABLATIONS = commands(DOCS / "docs" / "use.md", "rapm distill --teacher toy")


def test_the_papers_ablations_are_there_for_all_three_teachers() -> None:
    found = {}
    for start in ("--teacher toy", "--preset sd15-8gb", "--preset sdxl-12gb"):
        lines = commands(DOCS / "docs" / "use.md", f"rapm distill {start}")
        found[start] = [option(line, "set") for line in lines if "runs/mine" not in line]
    assert len({str(each) for each in found.values()}) == 1
    weights = [[f"rapm.absolute_weight={w}"] for w in ("0", "0.1", "0.5", "1", "2")]
    assert [each for each in found["--teacher toy"] if "absolute" in str(each)] == weights
    assert ["rapm.relative=false"] in found["--teacher toy"]
    assert [] in found["--teacher toy"]


@pytest.mark.parametrize("command", ABLATIONS, ids=lambda command: command[-1].split("/")[-1])
def test_an_ablation_of_the_toy_teacher_runs(command: list[str], tmp_path: Path) -> None:
    few = [*FEW, "samples.count=0", "device=cpu"]
    run = Run.open(tmp_path / "run", asked(command, few))
    make_trajectories(run)
    assert train_run(run)
    names = {name for record in run.read_metrics() for name in record}
    weights = run.config.rapm
    assert ("relative_distance" in names) == weights.relative
    assert ("absolute_distance" in names) == bool(weights.absolute_weight)

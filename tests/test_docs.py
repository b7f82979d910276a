"""Commands and snippets of the documents run as they stand, on small teachers for a few iterations;
and what is generated is what its source says."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import rapm.cli
import settings_page
from conftest import make_lora
from ldm import save_single_file
from rapm import estimate, measure, sample, scores, settings, train, ui
from rapm.config import Config
from rapm.evaluate import toy
from rapm.models import resolve, sources
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from test_toy import TEACHER_ROWS, row

DOCS = Path(__file__).parents[1]
PAGES = [DOCS / "README.md", *sorted((DOCS / "docs").glob("[!l]*.md"))]
FEW = ["trajectories.count=2", "training.iterations=2"]
INSTALLING = ["python3 -m venv .venv", "source .venv/bin/activate", "pip install .", "make demo"]
INSTALLING += ["make test"]


def lines(page: Path, start: str = "") -> list[str]:
    """Commands in the order they stand in; one that goes on in the next line is one."""
    text = page.read_text("utf-8").replace("\\\n", "")
    programs = "rapm|pip|python3?|source|make|cp"
    return re.findall(rf"^ {{4}}((?=(?:{programs}) ){start}.*?)(?: +#.*)?$", text, re.M)


def option(command: list[str], name: str) -> list[str]:
    return [value for key, value in pairwise(command) if key == f"--{name}"]


@pytest.fixture
def small_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_teachers: dict[str, Path]
) -> Path:
    """An empty folder with the files that a reader brings. Teachers are small, runs are short, what
    scores a student is not run."""
    from diffusers import DiffusionPipeline

    monkeypatch.chdir(tmp_path)
    whole = DiffusionPipeline.from_pretrained(small_teachers["sdxl"])
    save_single_file(whole, tmp_path / "my.safetensors")
    for k, name in enumerate(("a", "b", "theirs")):
        made = make_lora(small_teachers["sdxl"], tmp_path / name, "kohya", seed=k)
        made.rename(tmp_path / f"{name}.safetensors")
    (tmp_path / "prompts.csv").write_text("prompt\na red fox\na hare\n", encoding="utf-8")

    def from_cache(_: Any, repository: str, **__: Any) -> str:
        return str(small_teachers["sdxl" if "xl" in repository else "sd15"])

    def few(*given: Any, **more: Any) -> Config:
        asked = [*more.pop("settings", ()), *FEW, "device=cpu", "samples.count=0"]
        asked += ['student.targets=["to_q"]']  # the fewer, the faster
        asked += ["precision=float32"]  # some CPUs take long in any other
        if more.get("method") != "midpoint":
            asked += ["trajectories.fine_steps=2", 'discriminators.targets=["to_q"]']
        return load(*given, settings=asked, **more)

    load, walk = settings.load, sample.sample
    stages = dict.fromkeys(("trajectories", "training", "pictures"), 0)
    memory = {stage: {"network": 0} for stage in stages}
    iterations = {"discriminators": 1, "student": 1}
    plan = estimate.Plan({}, memory, 0, iterations, 0, stages, {})  # it has tests of its own
    rows = [*TEACHER_ROWS, row("student", 4, 0.2, 0.8)]
    for owner, name, other in (
        (sources, "_first_cached", from_cache),
        (resolve, "PUBLISHED", {}),
        (settings, "load", few),
        (estimate, "make_plan", lambda *_: plan),
        (measure, "measure", lambda *_: measure.Measured(0.1, dict.fromkeys(iterations, 0.1), 0)),
        (train, "dry_run", lambda *_: None),
        (train, "gradients", lambda *_: {"distance": 0.1}),  # nothing is learnt, fast
        (sample, "sample", lambda *given: walk(*given[:4], 2, *given[5:])),
        (scores, "_evaluate", lambda config, choices, *_, **__: [choices.name]),
        (toy, "score", lambda *_: rows),
        (ui, "serve", lambda *_: SimpleNamespace(block_thread=lambda: None)),
    ):
        monkeypatch.setattr(owner, name, other)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as caught:
        rapm.cli.main()
    assert caught.value.code == 0, command


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def test_commands_and_snippets_run_as_they_stand(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, in the order of the pages. The ablations' options are read here; that they train
    has a test below."""
    distil = typer.main.get_command(rapm.cli.app).get_command(None, "distill")  # type: ignore
    done = set()
    for command in [line for page in PAGES for line in lines(page)]:
        words = shlex.split(command)
        if command in done:
            continue
        done.add(command)
        if re.match("runs/(toy|15|xl)-", next(iter(option(words, "out")), "")):
            distil.make_context("distill", words[2:])
            assert asked(words, [])
        elif words[0] == "rapm":
            if words[1] == "prompts":
                Path(option(words, "out")[0]).unlink(missing_ok=True)
            run(command, monkeypatch)
        elif words[0] == "python":
            assert (DOCS / words[1]).is_file(), command
        elif words[0] == "cp":
            assert (DOCS / words[3]).is_dir(), command
        else:
            assert command in INSTALLING
        if command == "make demo":
            recipe = re.findall(r"^\t@\$\(BIN\)/(rapm .*)$", (DOCS / "Makefile").read_text(), re.M)
            assert len(recipe) == 2
            for line in recipe:
                run(line.replace("$(METHOD)", "rapm"), monkeypatch)
    assert len(done) > 30
    ran = [snippet for page in PAGES for snippet in snippets(page)]
    assert len(ran) == 3
    for snippet in ran:
        names: dict[str, Any] = {}
        exec(snippet, names)
        assert "image" not in names or names["image"].size == (64, 64)


def test_what_a_sentence_names_is_there() -> None:
    """Commands and options within sentences."""
    known = {c.name or c.callback.__name__ for c in rapm.cli.app.registered_commands if c.callback}
    assert {"distill", "presets"} <= known
    told = [re.findall(r"`rapm ([a-z]+)", page.read_text("utf-8")) for page in PAGES]
    assert {name for names in told for name in names} <= known
    targets = set(re.findall(r"^([a-z]+):", (DOCS / "Makefile").read_text(), re.M))
    told = [re.findall(r"`make ([a-z]+)", page.read_text("utf-8")) for page in PAGES]
    assert {name for names in told for name in names} <= targets
    links = [(page, re.findall(r"\]\(([^):#]+)\)", page.read_text("utf-8"))) for page in PAGES]
    missing = [link for page, names in links for link in names if not (page.parent / link).exists()]
    assert missing == []


def test_the_page_of_settings_is_what_the_settings_say() -> None:
    expected = settings_page.page()
    assert settings_page.PAGE.read_text("utf-8") == expected, "python tools/docs/settings_page.py"
    named = re.findall(r"^- `([\w.]+) = ", expected, re.M)
    assert named == [
        *(key for key in settings.keys(Config) if "." not in key),
        *(key for key in settings.keys(Config) if "." in key),
    ]


def test_the_readme_is_read_in_one_go() -> None:
    text = (DOCS / "README.md").read_text("utf-8").splitlines()
    assert len(text) < 120
    assert [line for line in text if len(line) > 100] == []


# ---- the paper's ablations


def asked(command: list[str], more: list[str]) -> Config:
    def one(name: str) -> str | None:
        return next(iter(option(command, name)), None)

    return settings.load(
        method=one("method"),
        preset=one("preset"),
        teacher=None if any(each.startswith("teacher=") for each in more) else one("teacher"),
        settings=[*option(command, "set"), *more],
    )


def commands(start: str) -> list[list[str]]:
    return [shlex.split(line) for line in lines(DOCS / "docs" / "use.md", start)]


ABLATIONS = [line for line in commands("rapm distill --teacher toy") if "python" not in line[-1]]


def test_the_papers_ablations_are_there_for_all_three_teachers() -> None:
    found = {}
    for start in ("--teacher toy", "--preset sd15-8gb", "--preset sdxl-12gb"):
        own = commands(f"rapm distill {start}")
        found[start] = [option(line, "set") for line in own if "runs/mine" not in line]
    assert len({str(each) for each in found.values()}) == 1
    weights = [[f"rapm.absolute_weight={w}"] for w in ("0", "0.1", "0.5", "1", "2")]
    assert [each for each in found["--teacher toy"] if "absolute" in str(each)] == weights
    assert ["rapm.relative=false"] in found["--teacher toy"]
    assert [] in found["--teacher toy"]


@pytest.mark.parametrize("command", ABLATIONS, ids=lambda command: command[-1].split("/")[-1])
def test_an_ablation_of_the_toy_teacher_runs(
    command: list[str], tmp_path: Path, tiny_teacher: Path, tiny_prompts: Path
) -> None:
    """Its settings, on a smaller teacher."""
    few = [*FEW, "trajectories.fine_steps=2", "samples.count=0", "device=cpu"]
    assert asked(command, few).teacher == "toy"
    few += [f"teacher={tiny_teacher}", f"trajectories.prompts={tiny_prompts}"]
    run = Run.open(tmp_path / "run", asked(command, few))
    make_trajectories(run)
    assert train_run(run)
    names = {name for record in run.read_metrics() for name in record}
    weights = run.config.rapm
    assert ("relative_distance" in names) == weights.relative
    assert ("absolute_distance" in names) == bool(weights.absolute_weight)

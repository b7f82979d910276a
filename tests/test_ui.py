"""The page of all runs: what it reads, and clicked through in a browser."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rapm import ui
from rapm.config import Config
from rapm.errors import UserError
from rapm.pipeline import distill_run
from rapm.run import Run
from rapm.samples import FEW, MANY, cut, row_file

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A folder of a finished run, one that has begun, and what is no run."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red star\n<b>a blue ring</b>\n")
    config = Config.model_validate(
        {
            "method": "midpoint",
            "teacher": str(tiny_teacher),
            "trajectories": {"prompts": str(prompts), "count": 2, "slots": 2},
            "student": {"rank": 2},
            "training": {"iterations": 4, "warmup": 0},
            "samples": {"every": 2},
        }
    )
    assert distill_run(Run.open(folder / "finished", config))
    Run.open(folder / "begun", config)
    (folder / "other").mkdir()
    return folder


def test_runs_are_listed_with_what_is_done(runs: Path) -> None:
    assert list(ui.runs_in(runs)) == ["begun", "finished"]
    assert list(ui.runs_in(runs / "finished")) == ["finished"]
    begun = "its settings, no trajectories and no checkpoint yet"
    assert ui.listed(runs) == [
        ["begun", "midpoint", begun, ""],
        ["finished", "midpoint", "iteration 4 of 4", ""],
    ]
    run = Run.existing(runs / "finished")
    text = run.metrics.read_text()
    try:
        half = text.splitlines()[:2]
        run.metrics.write_text("\n".join(half) + "\n")
        left = json.loads(half[-1])["seconds"] / 3600
        (_, row) = ui.listed(runs)
        assert row[2] == "iteration 2 of 4" and float(row[3].split()[0]) <= round(left, 2) + 0.01
        run.metrics.write_text("no JSON\n" + text)
        assert "metrics.jsonl" in ui.listed(runs)[1][2]
    finally:
        run.metrics.write_text(text)
    with pytest.raises(UserError, match="is no folder"):
        ui.runs_in(runs / "none")


def test_a_students_newest_picture_stands_beside_its_teachers(runs: Path) -> None:
    run = Run.existing(runs / "finished")
    for few, name in ((False, MANY), (True, FEW)):
        pair = ui.compared(run, 1, few)
        assert pair
        expected = cut(run.samples / name)[1], cut(row_file(run.samples, 4))[1]
        for shown, own in zip(pair, expected, strict=True):
            assert np.array_equal(np.asarray(shown), np.asarray(own))
    assert ui.compared(run, 2, False) is None  # there are two prompts
    assert ui.compared(Run.existing(runs / "begun"), 0, False) is None
    assert "Distance to the target" in ui.curves(run)
    assert ui.curves(Run.existing(runs / "begun")) == "No curves yet."


def test_without_gradio_it_says_what_to_install(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"it takes Gradio: pip install"):
        ui.build(runs)


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    pytest.importorskip("gradio", reason="needs Gradio, extra ui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = ui.serve(runs, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


def test_a_port_that_is_taken_is_one_line(runs: Path, address: str) -> None:
    with pytest.raises(UserError, match="cannot be served at"):
        ui.serve(runs, "127.0.0.1", int(address.rpartition(":")[2]))


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as Debian has it")
def test_it_is_clicked_through(runs: Path, address: str, tmp_path: Path) -> None:
    """A run is chosen, its slider and pictures are there, prompts are drawn, a mistake is told;
    nothing is asked of another host, and no lock is taken."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, extra dev")
    drawn = lambda: {*(runs / "finished" / "samples").glob("a-green*.png")}  # noqa: E731
    with sync_api.sync_playwright() as driver, Run.existing(runs / "finished").locked():
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        foreign: list[str] = []
        errors: list[str] = []
        tab.on("request", lambda r: foreign.append(r.url) if address not in r.url else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.get_by_text("iteration 4 of 4").wait_for()
        config = Run.existing(runs / "finished").config
        Run.open(runs / "later", config)  # begun while the page is open
        tab.get_by_text("later").first.wait_for(timeout=40_000)
        tab.get_by_label("Run", exact=True).click()
        tab.get_by_role("option", name="later", exact=True).wait_for()
        tab.get_by_role("option", name="finished", exact=True).click()
        tab.locator('svg[aria-label="Distance to the target"]').wait_for()
        tab.get_by_label("Prompt", exact=True).click()
        tab.get_by_role("option", name="<b>a blue ring</b>", exact=True).click()
        handle = tab.get_by_role("slider").first if tab.get_by_role("slider").count() else None
        pictures = tab.locator("img")
        for _ in range(100):
            if pictures.count() >= 3:
                break
            time.sleep(0.1)
        assert pictures.count() >= 3, "two under the slider, one strip"
        assert handle is None or handle.is_visible()
        tab.get_by_label("Prompts, one a line").fill("a green star\na green ring")
        tab.get_by_role("button", name="Draw with the newest checkpoint").click()
        for _ in range(600):
            if drawn():
                break
            time.sleep(0.1)
        (file,) = drawn()
        with Image.open(file) as picture:
            picture.load()
        assert file.name == "a-green-star-and-1-more-seed-0-steps-2.png"
        tab.get_by_label("Prompts, one a line").fill(" ")
        tab.get_by_role("button", name="Draw with the newest checkpoint").click()
        tab.get_by_text("Choose a run, and write a prompt a line.").wait_for()
        for image in tab.locator("img").all():
            assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        shutil.rmtree(runs / "later")
        for place in (".lock", "config.toml"):
            found = tab.request.get(f"{address}/gradio_api/file={runs / 'finished' / place}")
            assert found.status == 403
        tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        browser.close()
    assert (foreign, errors) == ([], [])

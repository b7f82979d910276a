"""A run's page: everything is in it, nothing is outside of it, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from conftest import changed
from rapm.config import Config
from rapm.evaluate.metrics import Score
from rapm.evaluate.rows import Row, Scores
from rapm.pipeline import distill_run
from rapm.report import write_report
from rapm.report.charts import chart, smooth, ticks, ticks_of_log
from rapm.run import Run
from rapm.scores import scores_file

HOSTILE = '<script>alert("x")</script> & "quotes"'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Tags with their attributes, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, tiny_teacher: Path
) -> Run:
    """A finished run, whose prompts would be HTML if nobody cared."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{HOSTILE}\na blue ring on sand\n")
    config = Config.model_validate(
        {
            "teacher": str(tiny_teacher),
            "trajectories": {"prompts": str(prompts), "count": 4, "slots": 3, "fine_steps": 2},
            "student": {"rank": 2},
            "discriminators": {"rank": 2, "head_width": 8},
            "training": {"iterations": 6, "warmup": 0},
            "samples": {"every": 3},
        }
    )
    run = Run.open(folder / "a run", config)
    assert distill_run(run)
    return run


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return Page(run.page.read_text())


def test_every_picture_is_in_it(run: Run, page: Page) -> None:
    """Two prompts: two of the teacher's rows, three of the student's; and two trajectories."""
    pictures = [image for image in page.of("img") if image.get("src")]
    assert len(pictures) == 2 * 5 + 2 * 4
    assert all(image["src"].startswith("data:image/webp;base64,") for image in pictures)  # type: ignore[union-attr]
    assert all(image["alt"] for image in page.of("img"))
    large = [image["data-row"] for image in pictures if "data-row" in image]
    assert large == [
        *["teacher, many steps"] * 2,
        *["teacher, 3 steps"] * 2,
        *["student, iteration 6"] * 2,
    ]
    assert run.page.stat().st_size < 5e6


def test_nothing_is_outside_of_it(page: Page) -> None:
    links = [tag for tag, each in page.tags if {"href", "src", "srcset"} & each.keys()]
    assert {*links} == {"a", "img"}
    assert {each["href"] for each in page.of("a")} == {"https://arxiv.org/abs/2503.20744"}
    assert "@import" not in "".join(page.texts) and "url(" not in "".join(page.texts)


def test_texts_of_users_are_texts(page: Page) -> None:
    assert len(page.of("script")) == 1
    shown = [text for text in page.texts if HOSTILE in text]
    assert len(shown) >= 2  # where it is chosen, and above its column
    assert any((image["alt"] or "").endswith(HOSTILE) for image in page.of("img"))


def test_what_is_said(run: Run, page: Page) -> None:
    said = " ".join(" ".join(page.texts).split())
    assert "A 3-step LoRA by RAPM, relative and absolute position matching" in said
    assert "iterations 6 of 6" in said
    for title in ("Compare", "While it trained", "One trajectory", "Curves", "Use it", "Settings"):
        assert title in said
    assert "pytorch_lora_weights.safetensors" in said and "a run-3-steps.safetensors" in said
    assert 'method = "rapm"' in said
    names = [svg["aria-label"] for svg in page.of("svg")]
    assert names[:4] == [
        "Distance to the target",
        "Distance, slot by slot; slot 0 is the last step",
        "Discriminators' margin: real less fake",
        "Length of the gradients, before the clip",
    ]
    assert "Scores" not in said and "Warning" not in said  # there are none


def test_signs_are_shown_with_their_remedies(run: Run, tmp_path: Path) -> None:
    lines = run.measures.read_text()
    records = [json.loads(line) | {"brightness": 0.5} for line in lines.splitlines()]
    run.measures.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        text = write_report([run], tmp_path / "page.html").read_text()
    finally:
        run.measures.write_text(lines)
    assert "Warning: pictures are darker than the teacher&#39;s: brightness is 0.50 of it." in text
    assert "Try: half of student.learning_rate." in text


def test_scores_are_shown_of_the_checkpoint_that_they_are_of(run: Run, tmp_path: Path) -> None:
    values = {"fid": Score(0.1234, 0.11, 0.1368), "captions": Score(0.75, 0.7, 0.8)}
    scores = Scores({"name": "toy", "captions": "test"}, [Row("student", 3, 1.0, 1000, values)])
    made, file = {"checkpoint": run.newest_checkpoint()[1]}, scores_file(run, "toy")

    def said() -> str:
        return write_report([run], tmp_path / "page.html").read_text()

    try:
        scores.save(file, made)
        assert "<td>0.123 ±0.013</td><td>0.750 ±0.050</td>" in said()
        assert "1000 pictures each" in said() and "protocol toy: captions test" in said()
        text = json.loads(file.read_text())
        for damaged in (text | {"checkpoint": "another"}, text | {"rows": [{}]}, []):
            file.write_text(json.dumps(damaged))
            assert "Scores" not in said()
    finally:
        file.unlink()


def test_a_picture_that_is_damaged_is_left_out(run: Run, tmp_path: Path) -> None:
    """A page that fails would end a command whose work is done."""
    for name in ("iteration-00000003.png", "teacher-few.png", "trajectory-teacher.png"):
        file = run.samples / name
        kept = file.read_bytes()
        try:
            for damaged in (kept[: len(kept) // 2], b"", None):
                file.unlink() if damaged is None else file.write_bytes(damaged)
                page = Page(write_report([run], tmp_path / "page.html").read_text())
                left = [image for image in page.of("img") if image.get("src")]
                assert len(left) == 18 - (4 if "trajectory" in name else 2)
        finally:
            file.write_bytes(kept)


def test_several_runs_stand_side_by_side(run: Run, tiny_midpoint: Config, tmp_path: Path) -> None:
    """Charts with a line for each, and the settings that differ; of each method those it reads."""
    other = Run.open(tmp_path / "other", changed(tiny_midpoint, training={"iterations": 2}))
    text = write_report([run, other], tmp_path / "page.html").read_text()
    page = Page(text)
    said = " ".join(" ".join(page.texts).split())
    assert "2 runs side by side" in said
    rows = dict(re.findall(r'<th scope="row">(\S+)</th><td>(.*?)</td>', text))
    assert rows["method"] == "rapm" and rows["training.iterations"] == "6"
    assert rows["discriminators.rank"] == "2"  # which midpoint has not
    assert "training.batch_size" not in rows  # the same in both
    assert "It is not RAPM" in said
    assert len(page.of("article")) == 2


def test_a_run_that_has_nothing_yet_has_a_page(tiny_config: Config, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "new", tiny_config)
    page = Page(write_report([run], run.page).read_text())
    assert page.of("img") == page.of("svg") == []
    assert "0 of 10" in " ".join(page.texts)


# ---- charts


def test_a_chart_is_a_drawing_of_its_numbers() -> None:
    """From 0 to 10 across 456 pixels, from 0 to 4 and a twentieth of that more on either side."""
    lines = {"a < b": ([0, 5, 10], [0.0, 4.0, 1.0]), "two": ([10], [2.0])}
    svg = ElementTree.fromstring(chart("T & t", lines, level=1.0))
    assert svg.attrib["aria-label"] == "T & t"
    (line, dot) = svg.findall("polyline")
    top, bottom = 44 + 216 / 22, 300 - 40 - 216 / 22
    found = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    height = bottom - top
    expected = [(52, bottom), (280, top), (508, bottom - height / 4)]
    for point, own in zip(found, expected, strict=True):
        assert point == pytest.approx(own, abs=0.06)
    assert float(svg.find("circle").attrib["cy"]) == pytest.approx(bottom - height / 2, abs=0.06)  # type: ignore[union-attr]
    assert dot.attrib["points"].startswith("508.0,")
    texts = [element.text for element in svg.findall("text")]
    assert texts[0] == "T & t" and {"a < b", "two", "iterations"} <= {*texts}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-0.1, 0.6, [-0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (0, 20_000, [0, 5000, 10_000, 15_000, 20_000]),
        (0.79, 1.01, [0.8, 0.85, 0.9, 0.95, 1.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_logarithm() -> None:
    assert ticks_of_log(-1, 0) == [0.1, 0.2, 0.5, 1]
    assert ticks_of_log(-2, 2) == [0.01, 0.1, 1, 10, 100]
    assert ticks_of_log(0.4, 0.45) == [2.55, 2.6, 2.65, 2.7, 2.75, 2.8]


def test_many_values_are_smoothed() -> None:
    values = [(k, float(k % 2)) for k in range(1000)]
    x, y = smooth(values)
    assert len(x) == 100 and x[-1] == 999 and {*y} == {0.5}
    assert smooth(values[:3]) == ([0, 1, 2], [0, 1, 0])


# ---- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as Debian has it")
def test_a_browser_shows_it(run: Run, tmp_path: Path) -> None:
    """No error, every picture has a size, the slider moves, another prompt can be chosen."""
    page = tmp_path / "page.html"
    moved = """<script>
        const found = {errors: window.errors, broken: 0, before: [], after: []};
        const look = () => [document.querySelector(".right").style.clipPath,
            document.querySelector(".left").src.length, document.querySelector(".left").alt];
        window.addEventListener("load", () => {
            found.broken = [...document.images].filter((i) => !i.naturalWidth).length;
            found.before = look();
            const range = document.querySelector("input[type=range]");
            const prompt = document.querySelector(".prompt");
            [range.value, prompt.value] = ["20", "1"];
            range.dispatchEvent(new Event("input", {bubbles: true}));
            found.after = look();
            document.title = JSON.stringify(found);
        });
    </script>"""
    caught = '<script>window.errors = []; onerror = (e) => errors.push("" + e);</script>'
    text = run.page.read_text()
    text = text.replace("<head>", f"<head>{caught}").replace("</body>", f"{moved}</body>")
    page.write_text(text)
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/own"]
    done = subprocess.run(
        [CHROMIUM, *arguments, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],  # type: ignore[list-item]
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    found = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert found["errors"] == [] and found["broken"] == 0
    assert found["before"][0] == "inset(0px 0px 0px 50%)"
    assert found["after"][0] == "inset(0px 0px 0px 20%)"
    assert found["before"][2].endswith(HOSTILE)
    assert found["after"][2] == "teacher, many steps: a blue ring on sand"


def test_large_pictures_become_small(tmp_path: Path) -> None:
    from rapm.report.page import embedded
    from rapm.samples import save_row

    save_row([Image.new("RGB", (1024, 512))] * 3, tmp_path / "row.png")
    found = embedded(tmp_path / "row.png", 128)
    assert len(found) == 3 and len(found[0]) < 1000

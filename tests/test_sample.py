"""What ``rapm sample`` draws, names and leaves alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import changed
from rapm.config import Config
from rapm.errors import UserError
from rapm.io import load_metadata, load_tensors, save_tensors
from rapm.network import TEACHER
from rapm.pictures import image_grid, to_pictures
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.sample import Sampler, open_sampler, sample_run

PROMPTS = ["a red star on grass", "a blue ring and a white cross on sand"]


@pytest.fixture
def finished(tiny_midpoint: Config, tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "run", changed(tiny_midpoint, training={"iterations": 2}))
    make_trajectories(run)
    assert train_run(run)
    return run


def test_prompts_stand_below_their_columns(tmp_path: Path) -> None:
    white = to_pictures(torch.ones(2, 3, 64, 64), 64)
    texts = ["one", "two words and more than that, so many that they take more than six lines " * 2]
    image_grid([("", white)], tmp_path / "with.png", captions=texts)
    image_grid([("", white)], tmp_path / "without.png")
    with Image.open(tmp_path / "without.png") as picture:
        plain = np.asarray(picture)
    with Image.open(tmp_path / "with.png") as picture:
        found = np.asarray(picture)
    assert found.shape == (plain.shape[0] + 6 * (12 + 4), plain.shape[1], 3)
    assert (found[: len(plain)] == plain).all()
    inked = (found[len(plain) :].min(2) < 128).reshape(6, 16, -1).any(1)  # by line and column
    first, second, between = slice(4, 68), slice(72, 136), slice(68, 72)
    assert inked[:, first].any(1).tolist() == [True, *[False] * 5]
    assert inked[:, second].any(1).tolist() == [True] * 6
    assert not inked[:, between].any()


def test_no_picture_takes_anothers_place(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named by its prompts and seed; what is drawn already is not drawn again."""
    run, sampler = finished, open_sampler(finished)
    monkeypatch.setattr("rapm.sample.open_sampler", lambda *_, **__: sampler)
    monkeypatch.setattr(Sampler, "images", lambda *_, **__: torch.zeros(1, 3, 16, 16))
    draw = partial(sample_run, run, count=1, many_steps=2)
    made: dict[str, dict[str, Any]] = {
        "seed-0-steps-3.png": {},
        "a-red-star-on-grass-seed-0-steps-3.png": {"prompts": ["a red star on grass"]},
        "a-red-star-on-grass-seed-3-steps-3.png": {"prompts": ["A red star, on grass"], "seed": 3},
        "a-red-star-on-grass-seed-0-steps-3-2.png": {"prompts": ["A red star, on grass"]},
        "a-red-star-on-grass-seed-0-steps-3-3.png": {
            "prompts": ["A red star, on grass"],
            "few_steps": 2,
        },
        "a-blue-ring-and-1-more-seed-0-steps-3.png": {"prompts": ["a blue ring", "b"]},
        "prompt-seed-0-steps-3.png": {"prompts": ["寿司"]},
        "seed-0-steps-3-2.png": {"many_steps": 3},
    }
    assert [draw(**asked).name for asked in made.values()] == list(made)
    before = {name: (run.samples / name).stat().st_mtime_ns for name in made}
    assert [draw(**asked).name for asked in made.values()] == list(made)
    assert {name: (run.samples / name).stat().st_mtime_ns for name in made} == before
    assert {file.name for file in run.samples.iterdir()} == set(made)
    newest = run._checkpoint(2)  # another student
    tensors = {name: value * 1.5 for name, value in load_tensors(newest).items()}
    save_tensors(newest, tensors, load_metadata(newest))
    assert draw().name == "seed-0-steps-3-3.png"


def test_a_file_that_was_named_is_not_overwritten(finished: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for before in (b"another's", b"\x89PNG\r\n\x1a\n"):
        file.write_bytes(before)
        with pytest.raises(UserError, match=r"a\.png is there already and shows something else"):
            sample_run(finished, count=1, many_steps=2, file=file)
        assert file.read_bytes() == before


def test_a_teacher_of_few_steps_is_shown_at_the_guidance_that_is_fair_to_it(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(finished.config, trajectories={"guidance_scale": 7.5})
    sampler = open_sampler(finished)
    sampler.guidance_scale = 7.5
    monkeypatch.setattr("rapm.sample.open_sampler", lambda *_, **__: sampler)
    grids: list[Any] = []
    monkeypatch.setattr("rapm.sample.image_grid", lambda rows, *_, **__: grids.append(rows))
    sample_run(Run(finished.folder, config), prompts=PROMPTS, count=1, many_steps=6, seed=9)
    assert "pictures     100% 12/12 [" in capsys.readouterr().err  # 6 + 3 + 3 steps of one batch
    assert [title for title, _ in grids[0]] == [
        "teacher, 6 steps, guidance 7.5 (12 network calls)",
        "teacher, 3 steps, guidance 3 (6 network calls)",
        "student, 3 steps, no guidance (3 network calls)",
    ]
    sampler.guidance_scale = 3.0
    expected = to_pictures(sampler.images(TEACHER, PROMPTS[:1], [9], 3), 128)
    assert np.array_equal(np.asarray(grids[0][1][1][0]), np.asarray(expected[0]))


def test_text_encoders_take_the_networks_turn(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU here; encoding fails, and the network comes back."""
    sampler = open_sampler(finished)
    family = replace(sampler.teacher.family, encode=lambda *_: 1 / 0)
    sampler.teacher = replace(sampler.teacher, family=family)
    sampler.backbone.device = torch.device("meta")
    moves: list[tuple[str, str]] = []

    def moved(texts: Any, device: Any) -> Any:
        moves.append((str(sampler.backbone.network.device), str(device)))
        return texts

    monkeypatch.setattr("rapm.sample.move", moved)
    with pytest.raises(ZeroDivisionError):
        sampler.encode(PROMPTS)
    assert moves == [("cpu", "meta"), ("cpu", "cpu")]  # of the network, of the text encoders
    assert sampler.backbone.network.device.type == "meta"

"""Pictures: grids, rows while a run trains, and what stored trajectories look like."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import changed
from rapm import pictures
from rapm import samples as samples_module
from rapm.config import Config
from rapm.errors import UserError
from rapm.methods import METHODS
from rapm.models.resolve import teacher_of
from rapm.models.teacher import load_backbone
from rapm.network import STUDENT, TEACHER
from rapm.pictures import facts_of_picture, image_grid, show_trajectories, to_pictures
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.sample import open_sampler
from rapm.samples import TrainingSamples, cut, measures, save_row
from rapm.sampling import guided, picture_noise
from rapm.schedule import trailing_timesteps
from rapm.trajectories import TrajectoryStore

BESIDE_ROWS = ["iterations.png", "teacher-few.png", "teacher.png"]
BESIDE_ROWS += ["trajectory-student.png", "trajectory-teacher.png"]
PROMPTS = ["a red star on grass", "a blue ring on sand"]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def in_a_row(images: torch.Tensor) -> np.ndarray:
    return np.hstack([np.asarray(picture) for picture in to_pictures(images, 64)]).astype(int)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def trained(config: Config, folder: Path) -> Run:
    run = Run.open(folder, config)
    make_trajectories(run)
    assert train_run(run)
    return run


@pytest.fixture(params=["rapm", "midpoint"])
def config(request: pytest.FixtureRequest) -> Config:
    return request.getfixturevalue({"rapm": "tiny_config"}.get(request.param, "tiny_midpoint"))


# ---- grids


def test_an_image_grid_has_the_size_it_should(tmp_path: Path) -> None:
    row = to_pictures(torch.zeros(3, 3, 64, 64), 128)
    image_grid([("one", row), ("two", row[:2])], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 132 + 4, 2 * (128 + 4 + 22) + 4)
        assert picture.getpixel((10, 60)) == (128, 128, 128)


def test_pictures_of_several_sizes_do_not_overlap(tmp_path: Path) -> None:
    wide, tall = torch.full((2, 3, 16, 32), -1.0), torch.full((2, 3, 24, 16), 0.0)
    rows = [("tall", to_pictures(tall)), ("wide", to_pictures(wide))]
    image_grid(rows, tmp_path / "grid.png")
    found = pixels(tmp_path / "grid.png")
    assert found.shape == (2 * (24 + 4 + 22) + 4, 2 * (32 + 4) + 4, 3)
    first, second = 4 + 22, (24 + 4 + 22) + 4 + 22  # tops of the two rows
    for left in (4, 4 + 36):
        assert (found[first : first + 24, left : left + 16] == 128).all()
        assert (found[second : second + 16, left : left + 32] == 0).all()


def test_no_sheet_is_too_large_to_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs refuse hundreds of megapixels; ours would be 64 pictures of 1024 x 1024, thrice."""
    monkeypatch.setattr(pictures, "MOST_PIXELS", 6 * 100 * 50)
    row = [Image.new("RGB", (200, 100))] * 3
    image_grid([("one", row), ("two", row)], tmp_path / "grid.png", facts={"a": 1})
    assert pixels(tmp_path / "grid.png").shape == (2 * (50 + 4 + 22) + 4, 3 * 104 + 4, 3)
    save_row(row, tmp_path / "row.png")
    assert [picture.size for picture in cut(tmp_path / "row.png")] == [(141, 70)] * 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert facts_of_picture(tmp_path / "grid.png") is None


def test_values_become_pixels() -> None:
    (picture,) = to_pictures(torch.tensor([-2.0, -1, 0, 1, 3]).expand(1, 3, 2, 5))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    (large,) = to_pictures(torch.zeros(1, 3, 16, 24), 64)
    assert large.size == (24 * 2, 16 * 2)  # whole pixels, as often as the width allows


# ---- while a run trains


def test_rows_at_the_start_in_between_and_at_the_end(config: Config, tmp_path: Path) -> None:
    """What they show is the student as it would be sampled; what it learns is the same to the bit
    as without pictures."""
    training = {"warmup": 0, "slot_batch": 3}
    config = changed(config, student={"learning_rate": 0.02}, training=training)
    run = trained(changed(config, samples={"every": 4, "count": 2}), tmp_path / "with")
    rows = [f"iteration-{k:08d}.png" for k in (0, 4, 8, 10)]
    assert names(run.samples) == [*rows, *BESIDE_ROWS]
    strip = pixels(run.samples / "iterations.png")
    assert strip.shape == (6 * (64 + 4 + 22) + 4, 2 * 64 + 4 + 4, 3)
    for place, name in enumerate(["teacher.png", "teacher-few.png", *rows]):
        top = place * (64 + 4 + 22) + 4 + 22
        assert (strip[top : top + 64, 4 : 4 + 128] == pixels(run.samples / name)).all()

    sampler = open_sampler(run)
    for name, adapter, steps in (
        (rows[-1], STUDENT, 3),
        ("teacher.png", TEACHER, 21),  # 20 or more, and a multiple of N
        ("teacher-few.png", TEACHER, 3),  # the run's guidance is 3, as it is there
    ):
        images = sampler.images(adapter, PROMPTS, [0, 1], steps)
        assert abs(pixels(run.samples / name) - in_a_row(images)).max() <= 1
    assert abs(pixels(run.samples / rows[0]) - pixels(run.samples / rows[-1])).max() > 1

    plain = trained(config, tmp_path / "without")
    assert not plain.samples.exists()
    assert plain.checkpoint_steps() == run.checkpoint_steps() == [4, 8, 10]
    (_, expected), (_, found) = plain.load_checkpoint(), run.load_checkpoint()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_trajectory_is_what_each_step_predicts(config: Config, tmp_path: Path) -> None:
    """Clean pictures predicted at the coarse timesteps, and the end; the student's and the
    teacher's, whose 21 steps come by there at every seventh."""
    samples = make_samples(changed(config, samples={"count": 1}), tmp_path)
    samples(0)
    run, backbone, schedule = samples.run, samples.method.backbone, samples.teacher.schedule
    row, shape = samples.store[0], samples.rows[0].absolute.shape[1:]
    prompt = {name: value[None] for name, value in row.conditioning.items()}
    vae = samples.teacher.load(["vae"], torch.float32, "cpu")
    both = guided(backbone, samples.store.unconditional, 3.0)
    for name, adapter, steps, denoiser in (
        ("student", STUDENT, 3, backbone),
        ("teacher", TEACHER, 21, both),
    ):
        z, clean = picture_noise(0, shape)[None], []
        for k, (t, s) in enumerate(pairwise(trailing_timesteps(steps))):
            with backbone.adapter(adapter), torch.no_grad():
                prediction = denoiser(z, torch.tensor([t]), prompt)
            if k % (steps // 3) == 0:
                clean.append(schedule.x0_and_eps(z, prediction, t)[0])
            z = schedule.step(z, prediction, t, s)
        images = samples.teacher.family.decode(vae, torch.cat([*clean, z]))
        found = pixels(run.samples / f"trajectory-{name}.png")
        assert abs(found - in_a_row(images)).max() <= 1
        assert len(cut(run.samples / f"trajectory-{name}.png")) == 4


def test_what_a_row_measures(tmp_path: Path) -> None:
    """Half as bright, a third of the contrast, the same places; then the places of the neighbour.

    Layouts of three flat pictures of grey 0, 64 and 128 are 64, 64 and 128 apart, in turn.
    """
    board = np.indices((32, 32)).sum(0) % 2 * 60
    teacher = [np.stack([board + level] * 3, 2) for level in (0, 64, 128)]
    rows = {0: [picture // 2 for picture in teacher], 10: [*teacher[1:], teacher[0]]}

    def write(pictures: list[np.ndarray], name: str) -> None:
        save_row([Image.fromarray(x.astype(np.uint8)) for x in pictures], tmp_path / name)

    write(teacher, "teacher.png")
    for k, row in rows.items():
        write(row, f"iteration-{k:08d}.png")
    first = measures(tmp_path, [0])
    assert first["brightness"] == pytest.approx(0.5, abs=0.01)
    assert first["contrast"] == pytest.approx(0.5, abs=0.01)
    assert first["sharpness"] == pytest.approx(0.25, abs=0.01)  # a variance
    second = measures(tmp_path, [0, 10])
    assert second["brightness"] == second["contrast"] == second["sharpness"] == 1
    assert second["to_teacher"] == pytest.approx(1)
    own = np.array([[94, 158, 30], [15, 47, 79]])  # means, less what the board adds
    apart = np.sqrt(((own[0] - own[1]) ** 2).mean()) / np.sqrt((64**2 + 64**2 + 128**2) / 3)
    assert second["moved"] == pytest.approx(apart, abs=0.01)
    assert "moved" not in first


def test_by_default_there_are_twenty_rows(
    tiny_midpoint: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(TrainingSamples, "__call__", lambda self, k: drawn.append(k) or {})
    monkeypatch.setattr("rapm.train.gradients", lambda *_: {})  # nothing is learnt, fast
    training = {"iterations": 390, "checkpoint_every": 1000}
    trained(changed(tiny_midpoint, training=training), tmp_path / "run")
    assert drawn == [*range(0, 390, 20), 390]


def test_the_strip_of_a_resumed_run_is_that_of_a_whole_one(
    tiny_midpoint: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a row, and between a checkpoint and its row."""
    config = changed(tiny_midpoint, samples={"every": 2, "count": 1}, training={"slot_batch": 3})
    whole, draw = trained(config, tmp_path / "whole"), TrainingSamples.__call__
    for kill, drawn, checkpoints in ((6, True, [4]), (8, False, [4, 8])):

        def interrupted(
            self: TrainingSamples, iteration: int, kill: int = kill, drawn: bool = drawn
        ) -> dict[str, float]:
            measured = draw(self, iteration) if iteration != kill or drawn else {}
            if iteration == kill:
                raise KeyboardInterrupt
            return measured

        run = Run.open(tmp_path / f"killed at {kill}", config)
        make_trajectories(run)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainingSamples, "__call__", interrupted)
            train_run(run)
        assert run.checkpoint_steps() == checkpoints
        assert train_run(run)
        assert names(run.samples) == names(whole.samples)
        for name in names(whole.samples):
            assert (run.samples / name).read_bytes() == (whole.samples / name).read_bytes()


def test_a_run_that_goes_back_forgets_the_rows_beyond(
    tiny_midpoint: Config, tmp_path: Path
) -> None:
    """Before there is a checkpoint other settings may be taken, and all rows are others."""
    samples = make_samples(changed(tiny_midpoint, samples={"count": 1}), tmp_path)
    for iteration in (0, 2, 4):
        samples(iteration)
    folder = samples.run.samples
    again = make_samples(
        changed(tiny_midpoint, samples={"count": 1}, trajectories={"guidance_scale": 7.0}), tmp_path
    )
    before = (folder / "teacher.png").read_bytes()
    again(0)
    assert names(folder) == ["iteration-00000000.png", *BESIDE_ROWS]
    assert (folder / "teacher.png").read_bytes() != before
    assert pixels(folder / "iterations.png").shape[0] == 3 * (64 + 4 + 22) + 4
    for iteration in (2, 4, 2):  # back to a checkpoint: the later row is drawn again in time
        again(iteration)
    assert pixels(folder / "iterations.png").shape[0] == 4 * (64 + 4 + 22) + 4
    assert "iteration-00000004.png" in names(folder)


def make_samples(config: Config, folder: Path) -> TrainingSamples:
    run = Run.open(folder / "run", config)
    store, teacher = make_trajectories(run), teacher_of(config)
    method = METHODS[config.method](
        config, load_backbone(teacher, config, "cpu"), teacher.schedule, store
    )
    return TrainingSamples(run, teacher, method, store)


@pytest.mark.parametrize(
    ("samples", "trajectories", "expected"),
    [
        ({"count": 8}, {}, [(4, 8, 8)] * 3),  # as many as there are prompts
        ({"count": 2}, {}, [(4, 8, 8)] * 2),
        ({"count": 0}, {}, []),
        # Those of the first one's size.
        ({"count": 3}, {"size": "16x16,32x16"}, [(4, 8, 8)] * 2),
    ],
)
def test_prompts_that_are_drawn(
    tiny_midpoint: Config,
    tmp_path: Path,
    samples: dict[str, Any],
    trajectories: dict[str, Any],
    expected: list[tuple[int, ...]],
) -> None:
    config = changed(tiny_midpoint, samples=samples, trajectories=trajectories)
    rows = make_samples(config, tmp_path).rows
    assert [tuple(row.absolute.shape[1:]) for row in rows] == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(28, "No space left on device"),
    ],
    ids=["GPU", "CPU", "disk"],
)
def test_too_little_room_for_pictures_does_not_end_a_run(
    tiny_midpoint: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(samples_module, "decode", full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = changed(tiny_midpoint, samples={"every": 1}, training={"iterations": 3})
        run = trained(changed(config, samples={"count": 2}), tmp_path / "run")
    lines = [str(warning.message) for warning in told if "pictures" in str(warning.message)]
    assert lines == [f"no pictures while training: {error}"]
    assert run.checkpoint_steps() == [3]
    assert not list(run.samples.glob("*"))


def test_another_error_is_not_hidden(
    tiny_midpoint: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    samples = make_samples(changed(tiny_midpoint, samples={"count": 2}), tmp_path)
    before = {name: p.clone() for name, p in samples.method.student.parameters.items()}
    monkeypatch.setattr(samples_module, "decode", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        samples(0)
    assert samples.method.backbone.active is None
    parameters = samples.method.student.parameters
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


# ---- trajectories


def test_trajectories_are_shown_with_what_the_teacher_predicted(
    tiny_config: Config, tmp_path: Path
) -> None:
    run = Run.open(tmp_path / "run", changed(tiny_config, rapm={"delta": 2}))
    store = make_trajectories(run)
    file = show_trajectories(run, 2)
    assert file == run.samples / "trajectories.png"
    found = pixels(file)
    assert found.shape == (4 * (128 + 4 + 22) + 4, 4 * 132 + 4, 3)

    teacher, grid, row = teacher_of(run.config), run.config.grid(), store[1]
    backbone = load_backbone(teacher, run.config, "cpu")
    denoiser = guided(backbone, store.unconditional, 3.0)
    prompt = {name: value[None] for name, value in row.conditioning.items()}
    clean = []
    for n in (2, 1, 0):
        z, t = row.absolute[n + 1][None], grid.coarse(n + 1)
        with backbone.adapter(TEACHER), torch.no_grad():
            prediction = denoiser(z, torch.tensor([t]), prompt)
        clean.append(teacher.schedule.x0_and_eps(z, prediction, t)[0])
    latents = torch.cat([row.absolute.flip(0), *clean, row.absolute[:1]])
    vae = teacher.load(["vae"], torch.float32, "cpu")
    expected = to_pictures(teacher.family.decode(vae, latents), 128)
    for place, picture in enumerate(expected):
        line, column = divmod(place, 4)
        top, left = (2 + line) * (128 + 4 + 22) + 4 + 22, column * 132 + 4
        shown = found[top : top + 128, left : left + 128]
        assert abs(shown - np.asarray(picture).astype(int)).max() <= 2
    assert show_trajectories(run, 99) == file  # no more than there are
    assert pixels(file).shape[0] == 2 * 6 * (128 + 4 + 22) + 4


def test_where_there_are_none_nothing_is_shown(tiny_midpoint: Config, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", tiny_midpoint)
    with pytest.raises(UserError, match="there is no finished trajectory store"):
        show_trajectories(run, 1)
    make_trajectories(run)
    with pytest.raises(UserError) as caught:
        show_trajectories(run, 1)
    line = "method 'midpoint' stores no trajectories: there is nothing to show"
    assert str(caught.value) == line
    assert not run.samples.exists()
    assert TrajectoryStore.open(run.trajectories).manifest["shard_size"] == 0

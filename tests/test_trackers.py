"""Other programs' logs of a run: TensorBoard's own reader, and what wandb is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import changed
from rapm import trackers
from rapm.config import Config
from rapm.errors import UserError
from rapm.pipeline import distill_run, make_trajectories, train_run
from rapm.run import Run


@pytest.fixture
def run(tiny_midpoint: Config, tmp_path: Path) -> Run:
    samples, training = {"every": 2, "count": 1}, {"iterations": 3}
    config = changed(tiny_midpoint, samples=samples, training=training)
    run = Run.open(tmp_path / "run", config)
    make_trajectories(run)
    return run


def test_tensorboard_reads_what_was_logged(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_run(run, "tensorboard")
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for name in ("distance", "distance/0", "student_gradient", "rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        records = [(r["iteration"], pytest.approx(r[name])) for r in run.read_metrics()]
        assert found == records and len(found) == 3
    measured = [(event.step, event.value) for event in events.Scalars("samples/brightness")]
    assert measured == [
        (r["iteration"], pytest.approx(r["brightness"])) for r in run.read_samples()
    ]
    assert [event.step for event in events.Images("samples")] == [0, 2, 3]
    assert "iteration" not in events.Tags()["scalars"]


def test_wandb_is_told_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of its module: the package takes 80 MB and a process of its own."""
    told: list[tuple[int, dict[str, Any]]] = []
    ended: list[bool] = []
    started: dict[str, Any] = {}

    def init(**given: Any) -> SimpleNamespace:
        started.update(given)
        return SimpleNamespace(
            log=lambda values, step: told.append((step, values)), finish=lambda: ended.append(True)
        )

    stand_in = SimpleNamespace(init=init, Image=lambda file: Path(file).name)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    assert train_run(run, "wandb")
    assert (started["project"], started["name"]) == ("rapm", "run")
    assert started["config"]["training.iterations"] == 3
    assert [step for step, _ in told] == [0, 0, 1, 2, 2, 3]
    assert told[0][1]["samples"] == "iteration-00000000.png"
    assert told[1][1].keys() == {
        *("distance", "distance/0", "distance/1", "distance/2", "student_gradient", "rate")
    }
    assert ended == [True]


def test_a_tracker_that_is_not_there_is_told_before_any_work(
    tiny_midpoint: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tmp_path / "run", tiny_midpoint)
    with pytest.raises(UserError) as caught:
        distill_run(run, "mlflow")
    assert str(caught.value) == "there is no tracker 'mlflow'; there are: tensorboard, wandb"
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        distill_run(run, "wandb")
    line = "--tracker wandb takes the package wandb: pip install 'rapm[track]'"
    assert str(caught.value) == line
    assert not run.trajectories.exists()

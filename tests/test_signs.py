"""Signs that a run goes wrong: each provoked, each silent on a healthy run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import changed
from rapm.config import Config
from rapm.pipeline import make_trajectories, train_run
from rapm.run import Run
from rapm.settings import load
from rapm.signs import find_signs

Records = list[dict[str, Any]]
ITERATIONS = 1200
MIDPOINT = "midpoint"


def healthy(method: str = "rapm") -> tuple[Config, Records, Records]:
    """Records such as the demos leave, with their noise."""
    config = load(method=method, preset="toy", settings=[f"training.iterations={ITERATIONS}"])
    noise, metrics = random.Random(0), []
    for k in range(ITERATIONS):
        record: dict[str, Any] = {"iteration": k, "rate": 1.0, "seconds": float(k)}
        falling = 1 - 0.5 * k / ITERATIONS
        if method == MIDPOINT:
            record |= {"distance": 0.12 * falling * noise.uniform(0.5, 1.5)}
            record |= {"student_gradient": noise.gauss(1.0, 0.3)}
        elif k % 2:
            for term in ("relative", "absolute"):
                record[f"{term}_distance"] = 0.25 * falling * noise.uniform(0.5, 1.5)
            record["student_gradient"] = noise.gauss(1.1, 0.3) * falling
        else:
            for term in ("relative", "absolute"):
                record[f"{term}_discriminator"] = noise.gauss(1.96, 0.1)
                record[f"{term}_margin"] = noise.gauss(0.04, 0.1)
                record[f"{term}_discriminator_gradient"] = noise.gauss(3.5, 0.5)
        metrics.append(record)
    samples = [
        {
            "iteration": k,
            "brightness": noise.gauss(1.0, 0.01),
            "contrast": noise.gauss(1.0, 0.01),
            "sharpness": noise.uniform(0.75, 1.1),
            "moved": 0.3 * (1 - k / ITERATIONS),
            "fid": 0.4 + 8 * 0.99**k + noise.uniform(0, 0.04),
        }
        for k in range(0, ITERATIONS + 1, 60)
    ]
    return config, metrics, samples


@pytest.mark.parametrize("method", ["rapm", MIDPOINT])
@pytest.mark.parametrize("done", [1, 60, 300, 720, ITERATIONS])
def test_nothing_is_said_of_a_healthy_run(method: str, done: int) -> None:
    config, metrics, samples = healthy(method)
    shown = [record for record in samples if record["iteration"] <= done]
    assert find_signs(config, metrics[:done], shown) == []
    assert find_signs(config, [], samples[:1]) == []


def last_samples(**values: list[float]) -> Callable[[Records, Records], None]:
    """Puts values at the end of what samples measured."""

    def put(metrics: Records, samples: Records) -> None:
        for name, each in values.items():
            for record, value in zip(samples[-len(each) :], each, strict=True):
                record[name] = value

    return put


def all_of(name: str, value: float) -> Callable[[Records, Records], None]:
    def put(metrics: Records, samples: Records) -> None:
        for record in metrics:
            if name in record:
                record[name] = value

    return put


def at_chance(metrics: Records, samples: Records) -> None:
    """As likely below zero as above."""
    for record in metrics:
        for name in record.keys() & {"relative_margin"}:
            record[name] = 0.1 * (-1) ** (record["iteration"] // 2)


PROVOKED: list[tuple[str, Callable[[Records, Records], None], str]] = [
    ("darker", last_samples(brightness=[0.7, 0.8]), "brightness is 0.80 of it"),
    ("brighter", last_samples(brightness=[1.2, 1.3]), "brightness is 1.30 of it"),
    ("paler", last_samples(contrast=[0.7, 0.7]), "contrast is 0.70 of it"),
    ("harder in contrast", last_samples(contrast=[1.3, 1.3]), "contrast is 1.30 of it"),
    ("blurrier", last_samples(sharpness=[0.4, 0.3]), "sharpness is 0.30 of it"),
    ("grainier", last_samples(sharpness=[2.1, 3.0]), "sharpness is 3.00 of it"),
    ("jumps", last_samples(moved=[0.6, 0.5]), "by 0.50 of the distance"),
    ("score rises", last_samples(fid=[0.4, 0.5, 0.6, 0.9]), "FID is 0.900, after 0.400"),
    ("score fluctuates", last_samples(fid=[0.6, 0.5, 0.8, 0.5, 0.5]), "from 0.500 to 0.800"),
    ("relative discriminator at chance", at_chance, "its margin is 0.000 +- 0.0"),
    (
        "absolute discriminator saturated",
        all_of("absolute_discriminator", 0.1),
        "its loss is 0.100, where chance is 2",
    ),
    ("clipped", all_of("student_gradient", 3.0), "3.00 in the mean, clipped at 1"),
    (
        "absolute distance does not fall",
        all_of("absolute_distance", 0.25),
        "the absolute distance does not fall: 0.250, after 0.250",
    ),
    (
        "no gradient for the relative discriminator",
        all_of("relative_discriminator_gradient", 0.0),
        "the relative discriminator had no gradient for 20 updates",
    ),
]


@pytest.mark.parametrize(("name", "provoke", "told"), PROVOKED, ids=[each[0] for each in PROVOKED])
def test_each_is_provoked(
    name: str, provoke: Callable[[Records, Records], None], told: str
) -> None:
    config, metrics, samples = healthy()
    provoke(metrics, samples)
    (sign,) = find_signs(config, metrics, samples)
    assert sign.name == name
    assert told in sign.seen
    assert ". Likely cause: " in str(sign) and ". Try: " in str(sign)


def test_a_single_sample_is_no_sign() -> None:
    config, metrics, samples = healthy()
    last_samples(brightness=[0.5], contrast=[2.0], sharpness=[0.1], moved=[0.9])(metrics, samples)
    assert find_signs(config, metrics, samples) == []


def test_without_absolute_loss_that_is_why_structure_jumps() -> None:
    _, metrics, samples = healthy()
    config = load(preset="toy", settings=["rapm.absolute_weight=0", "training.iterations=1200"])
    last_samples(moved=[0.6, 0.5])(metrics, samples)
    (sign,) = find_signs(config, metrics, samples)
    assert (sign.cause, sign.remedy) == ("no absolute loss", "rapm.absolute_weight = 1")


def test_a_student_that_does_not_learn_is_told(
    tiny_midpoint: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real run of a tiny teacher, at a rate that changes nothing: in the console once, and
    in the records of samples."""
    config = changed(
        tiny_midpoint,
        student={"learning_rate": 1e-9},
        training={"iterations": 40, "warmup": 0},
        samples={"every": 20, "count": 1},
    )
    run = Run.open(tmp_path / "run", config)
    make_trajectories(run)
    assert train_run(run)
    said = capfd.readouterr().err
    names = {name for record in run.read_samples() for name in record["signs"]}
    assert "distance does not fall" in names
    assert said.count("the distance does not fall") == 1
    assert [record["iteration"] for record in run.read_samples()] == [0, 20, 40]

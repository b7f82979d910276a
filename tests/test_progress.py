"""What a bar leaves in a file or pipe, which is what pytest gives it."""

from __future__ import annotations

import re

import pytest

from rapm import progress
from rapm.progress import track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def numbers(text: str) -> list[int]:
    """Of items done, line by line; there is nothing else in it."""
    lines = text.splitlines(keepends=True)
    found = [re.fullmatch(r"stage +\d+% (\d+)/\d+ \[.* gone, .* left.*\]\n", x) for x in lines]
    assert all(found) and "\r" not in text
    return [int(match[1]) for match in found if match]


def test_a_line_every_five_percent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(1000), "stage"):
        clock[0] += 0.01
    assert numbers(capsys.readouterr().err) == list(range(0, 1001, 50))


def test_a_line_every_thirty_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(range(1000), "stage"):
        clock[0] += 10
    assert numbers(capsys.readouterr().err) == [*range(0, 1000, 3), 1000]


def test_steps_of_any_length_and_a_start_half_way(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with track(None, "stage", total=100, initial=40) as bar:
        for step in (1, 3, 1, 55):
            bar.update(step)
    assert numbers(capsys.readouterr().err) == [40, 45, 100]


def test_what_was_stopped_ends_without_a_line(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for k in track(range(100), "stage"):
        if k == 12:
            break
    assert numbers(capsys.readouterr().err) == [0, 5, 10]


def test_time_left_is_by_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast and slow iterations take turns; after 50 of 100 in 100 seconds, 100 seconds are left."""
    bar = track(None, "stage", total=100)
    now = bar.start_t = bar.last_print_t = 1000.0
    monkeypatch.setattr(bar, "_time", lambda: now)
    for k in range(50):
        now += 0.1 if k % 2 else 3.9
        bar.update()
    assert "[01:40 gone, 01:40 left]" in str(bar)

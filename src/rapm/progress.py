"""One progress bar for every stage, with time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS, SHARE = 30.0, 0.05  # between two lines in a file: whichever comes first


class _Lines(tqdm):  # type: ignore[type-arg]
    """For a file or pipe: whole lines and no carriage returns."""

    _told: tuple[float, float] | None = None  # when, and how many were done

    def display(self, *_: Any, **__: Any) -> None:
        when, done = self._told or (float("-inf"), 0)
        now, step = time.monotonic(), SHARE * (self.total or float("inf"))
        ends = self.n == self.total and done != self.n
        if ends or now - when >= SECONDS or self.n - done >= step:
            self._told = now, self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        self.disable = True  # without tqdm's last, empty line


def say(text: str) -> None:
    """A line on the error stream, above a bar that may be there."""
    tqdm.write(text, file=sys.stderr)


def track(
    items: Iterable[T] | None, description: str, *, total: int | None = None, initial: int = 0
) -> tqdm[T]:
    """Wraps ``items``; time left is by the mean of all that was done, so that it does not jump.

    In a file or pipe rather than a terminal it is a line every 30 seconds or 5 %.
    """
    in_terminal = sys.stderr.isatty()
    kind: Any = tqdm if in_terminal else _Lines
    return kind(
        items,
        desc=f"{description:<12}",
        total=total,
        initial=initial,
        smoothing=0,
        mininterval=0.2 if in_terminal else 0,
        miniters=None if in_terminal else 1,
        bar_format="{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} "
        "left{postfix}]",
    )

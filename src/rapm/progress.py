"""One progress bar for every stage, with time left."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(
    items: Iterable[T], description: str, *, total: int | None = None, initial: int = 0
) -> tqdm[T]:
    """Wraps ``items``; in a log file rather than a terminal the bar comes once in 15 seconds."""
    return tqdm(
        items,
        desc=f"{description:<12}",
        total=total,
        initial=initial,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        bar_format="{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} "
        "left{postfix}]",
    )

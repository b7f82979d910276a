"""How many threads to compute with where other programs use the CPU too."""

from __future__ import annotations

import os

import psutil
import torch

LOOKED_AT = 0.5  # seconds; a load average would still count what has just ended
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads_for_idle_cores() -> str | None:
    """Takes as many threads as there are idle cores; torch's threads wait for each other, so one
    that finds no core holds up all of them.

    Returns:
        What was chosen and how to choose otherwise; None where nothing was.
    """
    before = torch.get_num_threads()
    if before == 1 or any(name in os.environ for name in CHOSEN_BY_USER):
        return None
    cores = psutil.cpu_count() or before
    busy = round(cores * psutil.cpu_percent(LOOKED_AT) / 100)
    threads = min(before, max(1, cores - busy))
    if threads == before:
        return None
    torch.set_num_threads(threads)
    return (
        f"{busy} of {cores} cores are busy: computes with {threads} of {before} threads "
        "(OMP_NUM_THREADS=N chooses)"
    )
